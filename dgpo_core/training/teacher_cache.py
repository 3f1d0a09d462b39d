"""The teacher's distributions on its own episodes, computed once for all epochs and recipes.

Of each token that the teacher wrote its likeliest successors are kept, and with them a certificate: what this
costs in KL, measured against the full vocabulary, and which tokenizer and vocabulary they belong to.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from dgpo_core.agent.episode import Episode
from dgpo_core.agent.prompts import known_ids
from dgpo_core.config.training import ComputeConfig, DistributionsConfig, TaidConfig
from dgpo_core.errors import UserError
from dgpo_core.files import replacement
from dgpo_core.objectives import divergences
from dgpo_core.objectives.divergences import Divergence
from dgpo_core.objectives.logprobs import TopK, cached_terms, distillation_terms, top_distributions
from dgpo_core.training.batches import (
    backbone_of,
    check_ids,
    collate,
    counted_hidden,
    head_of,
    micro_batches,
    model_sequence,
    shared_ids,
)
from dgpo_core.training.checkpoint import require_finite
from dgpo_core.training.parallel import autocast

CERTIFICATE = "certificate.json"
TAID = TaidConfig()


@dataclass(frozen=True)
class Certificate:
    """What the kept distributions are and what they cost.

    `kl_error_*` (nats a token): by how much KL[teacher || student] from them is below that over the full
    vocabulary, for the untrained student on `sample_tokens` tokens; `rest_*`: the teacher's mass outside.
    `taid_error_*`: the same of TAID's divergence at its first t, where most of the target is the student's
    own; it may be off to either side, so the largest is an absolute value.
    """

    tokenizer: str
    vocabulary: int
    top_k: int
    episodes: int
    sample_tokens: int
    kl_full_mean: float
    kl_error_mean: float
    kl_error_max: float
    taid_full_mean: float
    taid_error_mean: float
    taid_error_max: float
    rest_mean: float
    rest_max: float


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary, id by id."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def key_of(episode: Episode) -> str:
    """Of an episode's tokens: the distributions belong to them and to nothing else."""
    return hashlib.sha256(np.asarray(episode.token_ids, dtype=np.int64).tobytes()).hexdigest()


def keep_distributions(
    folder: Path,
    episodes: Sequence[Episode],
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: Any,
    config: DistributionsConfig,
    compute: ComputeConfig,
    progress: Callable[[int, int], None],
    taid: TaidConfig = TAID,
) -> Certificate:
    """Write the distributions of all episodes, and their certificate, measured on `config.sample` of them.

    The sample is drawn over all episodes, always the same: they lie data set after data set.
    Every `config.chunk` episodes have a file, which appears complete: interrupted, the next call with the
    same folder goes on behind the last one. No more than one chunk is in memory. Raises NotFinite for a model
    that gives no numbers.
    """
    vocabulary = shared_ids(known_ids(tokenizer), student, teacher)
    check_ids(episodes, vocabulary)
    k = min(config.top_k or vocabulary, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(episodes), config.chunk):
        path, chunk = folder / f"{start:08d}.arrow", episodes[start : start + config.chunk]
        if not path.exists():
            kept: dict[int, TopK] = {}
            for some in _likeliest(chunk, teacher, vocabulary, k, compute):
                kept |= some
                progress(start + len(kept), len(episodes))
            _write(path, chunk, [kept[i] for i in range(len(chunk))])
        progress(start + len(chunk), len(episodes))
    drawn = random.Random(0).sample(episodes, min(config.sample, len(episodes)))
    full, error = _measured(drawn, teacher, student, vocabulary, k, compute, divergences.forward_kl)
    taid_full, taid_error = _measured(
        drawn, teacher, student, vocabulary, k, compute, divergences.taid(taid.start)
    )
    rest = _rest(folder, k)
    certificate = Certificate(
        tokenizer=fingerprint(tokenizer),
        vocabulary=vocabulary,
        top_k=k,
        episodes=len(episodes),
        sample_tokens=len(error),
        kl_full_mean=_rounded(full.mean()),
        kl_error_mean=_rounded(error.mean()),
        kl_error_max=_rounded(error.max()),
        taid_full_mean=_rounded(taid_full.mean()),
        taid_error_mean=_rounded(taid_error.mean()),
        taid_error_max=_rounded(taid_error.abs().max()),
        rest_mean=_rounded(rest.mean()),
        rest_max=_rounded(rest.max()),
    )
    require_finite({"kl_full_mean": certificate.kl_full_mean, "taid_full_mean": certificate.taid_full_mean})
    (folder / CERTIFICATE).write_text(json.dumps(asdict(certificate), indent=2) + "\n")
    return certificate


@torch.no_grad()
def _likeliest(
    episodes: Sequence[Episode],
    teacher: PreTrainedModel,
    vocabulary: int,
    k: int,
    compute: ComputeConfig,
) -> Iterator[dict[int, TopK]]:
    """One micro-batch after the other: the likeliest tokens at the model tokens of `episodes[i]`, by i."""
    sequences = [model_sequence(episode) for episode in episodes]
    for part in micro_batches([len(s.ids) for s in sequences], compute.micro_batch_tokens):
        batch = collate([sequences[i] for i in part], teacher.device)
        with autocast(compute):
            hidden = counted_hidden(backbone_of(teacher), batch)
            top = top_distributions(hidden, head_of(teacher), vocabulary, k)
        logprobs = top.logprobs.cpu()
        require_finite({"teacher's log-probability": logprobs.sum().item()})
        pieces = zip(part, batch.split(top.ids.cpu().int()), batch.split(logprobs), strict=True)
        yield {i: TopK(ids, logprobs, vocabulary) for i, ids, logprobs in pieces}


@torch.no_grad()
def _measured(
    episodes: Sequence[Episode],
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    vocabulary: int,
    k: int,
    compute: ComputeConfig,
    divergence: Divergence,
) -> tuple[torch.Tensor, torch.Tensor]:
    """At each model token the divergence, and by how much it is more than from the kept tokens."""
    sequences = [model_sequence(episode) for episode in episodes]
    full, errors = [], []
    for part in micro_batches([len(s.ids) for s in sequences], compute.micro_batch_tokens):
        batch = collate([sequences[i] for i in part], teacher.device)
        with autocast(compute):
            hidden = counted_hidden(backbone_of(teacher), batch)
            top = top_distributions(hidden, head_of(teacher), vocabulary, k)
            own = counted_hidden(backbone_of(student), batch)
            heads = head_of(student)[:vocabulary], head_of(teacher)[:vocabulary]
            exact = distillation_terms(own, heads[0], hidden, heads[1], batch.targets, divergence)[1]
            near = cached_terms(own, heads[0], top, batch.targets, divergence)[1]
        full.append(exact.cpu())
        errors.append((exact - near).cpu())
    return torch.cat(full), torch.cat(errors)


def _rest(folder: Path, k: int) -> torch.Tensor:
    """The teacher's mass outside of the kept tokens, at each model token of all files."""
    rests = []
    for path in _files(folder):
        flat = _read(path)["logprobs"].combine_chunks().flatten().to_numpy()
        rests.append(1 - np.exp(flat.reshape(-1, k)).sum(-1))
    return torch.from_numpy(np.concatenate(rests)).clamp(min=0)


class TeacherCache:
    """Kept distributions by episode."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        """Raises UserError when there are none, or when they belong to another tokenizer."""
        try:
            self.certificate = Certificate(**json.loads((folder / CERTIFICATE).read_text()))
            table = pa.concat_tables(_read(path) for path in _files(folder))
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: no such file; run the stage distributions first") from None
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise UserError(
                f"{folder}: no kept distributions; run the stage distributions again ({error})"
            ) from error
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


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def _read(path: Path) -> pa.Table:
    """Mapped into memory: processes that train side by side share it, and what is not used is not read."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _write(path: Path, episodes: Sequence[Episode], kept: list[TopK]) -> None:
    table = pa.table(
        {
            "key": [key_of(episode) for episode in episodes],
            "ids": pa.array([top.ids.flatten().numpy() for top in kept], pa.large_list(pa.int32())),
            "logprobs": pa.array(
                [top.logprobs.flatten().numpy() for top in kept], pa.large_list(pa.float32())
            ),
        }
    )
    with (
        replacement(path) as part,
        pa.OSFile(str(part), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)


def _rounded(value: torch.Tensor) -> float:
    return float(f"{float(value):.6g}")
