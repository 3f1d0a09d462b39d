"""The teacher's distributions on its own episodes, computed once for all epochs and recipes.

Of each token that the teacher wrote its likeliest successors are kept, and with them a certificate: what this
costs in KL, measured against the full vocabulary, and which tokenizer and vocabulary they belong to.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from dgpo_core.config.training import ComputeConfig
from dgpo_core.errors import UserError
from dgpo_core.objectives.logprobs import TopK, cached_terms, distillation_terms, top_distributions
from dgpo_core.protocol.episode import Episode
from dgpo_core.training.batches import (
    backbone_of,
    collate,
    counted_hidden,
    head_of,
    micro_batches,
    model_sequence,
)
from dgpo_core.training.compute import autocast

DISTRIBUTIONS, CERTIFICATE = "distributions.parquet", "certificate.json"


@dataclass(frozen=True)
class Certificate:
    """What the kept distributions are and what they cost.

    `kl_error_*` (nats a token): by how much KL[teacher || student] from them is below that over the full
    vocabulary, for the untrained student on `sample_tokens` tokens; `rest_*`: the teacher's mass outside.
    """

    tokenizer: str
    vocabulary: int
    top_k: int
    episodes: int
    sample_tokens: int
    kl_full_mean: float
    kl_error_mean: float
    kl_error_max: float
    rest_mean: float
    rest_max: float


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary, id by id."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def key_of(episode: Episode) -> str:
    """Of an episode's tokens: the distributions belong to them and to nothing else."""
    return hashlib.sha256(np.asarray(episode.token_ids, dtype=np.int64).tobytes()).hexdigest()


@torch.no_grad()
def keep_distributions(
    folder: Path,
    episodes: Sequence[Episode],
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: Any,
    top_k: int | None,
    sample: int,
    compute: ComputeConfig,
    progress: Callable[[int, int], None],
) -> Certificate:
    """Write the distributions of all episodes and their certificate, measured on the first `sample`."""
    vocabulary = min(len(head_of(teacher)), len(head_of(student)))
    sequences = [model_sequence(episode) for episode in episodes]
    kept: dict[int, TopK] = {}
    errors: list[torch.Tensor] = []
    full: list[torch.Tensor] = []
    for part in micro_batches([len(s.ids) for s in sequences], compute.micro_batch_tokens):
        batch = collate([sequences[i] for i in part], teacher.device)
        with autocast(compute):
            hidden = counted_hidden(backbone_of(teacher), batch)
            top = top_distributions(hidden, head_of(teacher), vocabulary, top_k)
            if any(i < sample for i in part):
                own = counted_hidden(backbone_of(student), batch)
                exact = distillation_terms(own, head_of(student), hidden, head_of(teacher), batch.targets)[1]
                near = cached_terms(own, head_of(student), top, batch.targets)[1]
                full.append(exact.cpu())
                errors.append((exact - near).cpu())
        pieces = zip(part, batch.split(top.ids.cpu()), batch.split(top.logprobs.cpu()), strict=True)
        kept |= {i: TopK(ids, logprobs, vocabulary) for i, ids, logprobs in pieces}
        progress(len(kept), len(sequences))
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / DISTRIBUTIONS, episodes, [kept[i] for i in range(len(episodes))])
    rest = torch.cat([1 - top.logprobs.exp().sum(-1) for top in kept.values()]).clamp(min=0)
    error, exact_kl = torch.cat(errors), torch.cat(full)
    certificate = Certificate(
        tokenizer=fingerprint(tokenizer),
        vocabulary=vocabulary,
        top_k=kept[0].ids.shape[1],
        episodes=len(episodes),
        sample_tokens=len(error),
        kl_full_mean=_rounded(exact_kl.mean()),
        kl_error_mean=_rounded(error.mean()),
        kl_error_max=_rounded(error.max()),
        rest_mean=_rounded(rest.mean()),
        rest_max=_rounded(rest.max()),
    )
    (folder / CERTIFICATE).write_text(json.dumps(asdict(certificate), indent=2) + "\n")
    return certificate


class TeacherCache:
    """Kept distributions by episode."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        """Raises UserError when there are none, or when they belong to another tokenizer."""
        try:
            self.certificate = Certificate(**json.loads((folder / CERTIFICATE).read_text()))
            table = pq.read_table(folder / DISTRIBUTIONS)
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: no such file; run the stage distributions first") from None
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise UserError(f"{folder}: no kept distributions: {error}") from error
        if self.certificate.tokenizer != fingerprint(tokenizer):
            raise UserError(f"{folder}: these distributions belong to another tokenizer than the student's")
        self._table = table
        self._rows = {key: row for row, key in enumerate(table["key"].to_pylist())}

    def get(self, episode: Episode) -> TopK | None:
        """One row a model token; None for an episode that was not kept."""
        row = self._rows.get(key_of(episode))
        if row is None:
            return None
        k = self.certificate.top_k
        ids, logprobs = (
            torch.from_numpy(self._table[name][row].values.to_numpy(zero_copy_only=False).copy()).view(-1, k)
            for name in ("ids", "logprobs")
        )
        return TopK(ids.long(), logprobs, self.certificate.vocabulary)


def _write(path: Path, episodes: Sequence[Episode], kept: list[TopK]) -> None:
    table = pa.table(
        {
            "key": [key_of(episode) for episode in episodes],
            "ids": pa.array([top.ids.flatten().numpy() for top in kept], pa.list_(pa.int32())),
            "logprobs": pa.array([top.logprobs.flatten().numpy() for top in kept], pa.list_(pa.float32())),
        }
    )
    pq.write_table(table, path, compression="zstd")


def _rounded(value: torch.Tensor) -> float:
    return float(f"{float(value):.6g}")
