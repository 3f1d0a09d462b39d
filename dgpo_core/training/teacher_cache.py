"""The teacher's distributions on its own episodes, computed once for all epochs and recipes.

The likeliest ids in the place of each token that the teacher wrote are stored, with a certificate: what this
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
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dgpo_core.agent.episode import Episode
from dgpo_core.agent.prompts import known_ids
from dgpo_core.config.training import ComputeConfig, DistributionsConfig, TaidConfig
from dgpo_core.errors import UserError
from dgpo_core.files import read_json, replacement
from dgpo_core.objectives import divergences
from dgpo_core.objectives.divergences import Divergence
from dgpo_core.objectives.logprobs import TopK, cached_losses, distillation_losses, top_distributions
from dgpo_core.threads import side_by_side, single_threaded
from dgpo_core.training.batches import (
    TokenBatch,
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
    """Says what the stored distributions are and what they cost, in nats a token.

    `kl_error_*` is by how much KL[teacher || student] from them is below that over the full vocabulary, for
    the untrained student on `sample_tokens` tokens. `taid_error_*` is the same for TAID's divergence at its
    first t, where most of the target is the student's own; it may be off to either side, so the largest is an
    absolute value. `rest_*` is the teacher's mass outside of the stored ids.
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


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of the vocabulary, id by id."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def episode_key(episode: Episode) -> str:
    """Return the SHA-256 of the episode's tokens: distributions belong to them and to nothing else."""
    return hashlib.sha256(np.asarray(episode.token_ids, dtype=np.int64).tobytes()).hexdigest()


@single_threaded()
def build_cache(
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
    same folder goes on behind the last one. No more than one chunk is in memory. Raise NotFinite for a model
    that gives no numbers.
    """
    vocabulary = shared_ids(known_ids(tokenizer), student, teacher)
    check_ids(episodes, vocabulary)
    k = min(config.top_k or vocabulary, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    # (1) The likeliest ids at each model token, file after file.
    for start in range(0, len(episodes), config.chunk):
        path, chunk = folder / f"{start:08d}.arrow", episodes[start : start + config.chunk]
        if not path.exists():
            stored: dict[int, TopK] = {}
            for some in _top_k(chunk, teacher, vocabulary, k, compute):
                stored |= some
                progress(start + len(stored), len(episodes))
            _write(path, chunk, [stored[i] for i in range(len(chunk))])
        progress(start + len(chunk), len(episodes))
    # (2) What they cost, against the full vocabulary.
    sample = random.Random(0).sample(episodes, min(config.sample, len(episodes)))
    kl, kl_error = _errors(sample, teacher, student, vocabulary, k, compute, divergences.forward_kl)
    own_taid = divergences.taid(taid.start)
    taid_kl, taid_error = _errors(sample, teacher, student, vocabulary, k, compute, own_taid)
    rest = _mass_outside(folder, k)
    # (3) Certificate.
    certificate = Certificate(
        tokenizer=tokenizer_hash(tokenizer),
        vocabulary=vocabulary,
        top_k=k,
        episodes=len(episodes),
        sample_tokens=len(kl_error),
        kl_full_mean=_rounded(kl.mean()),
        kl_error_mean=_rounded(kl_error.mean()),
        kl_error_max=_rounded(kl_error.max()),
        taid_full_mean=_rounded(taid_kl.mean()),
        taid_error_mean=_rounded(taid_error.mean()),
        taid_error_max=_rounded(taid_error.abs().max()),
        rest_mean=_rounded(rest.mean()),
        rest_max=_rounded(rest.max()),
    )
    require_finite({"kl_full_mean": certificate.kl_full_mean, "taid_full_mean": certificate.taid_full_mean})
    (folder / CERTIFICATE).write_text(json.dumps(asdict(certificate), indent=2) + "\n")
    return certificate


def _batches(
    episodes: Sequence[Episode], device: torch.device, compute: ComputeConfig
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Yield micro-batches of the episodes' model tokens, with the episodes' indices."""
    sequences = [model_sequence(episode) for episode in episodes]
    for part in micro_batches([len(s.ids) for s in sequences], compute.micro_batch_tokens):
        yield part, collate([sequences[i] for i in part], device)


def _top_k(
    episodes: Sequence[Episode], teacher: PreTrainedModel, vocabulary: int, k: int, compute: ComputeConfig
) -> Iterator[dict[int, TopK]]:
    """Yield the likeliest ids at the model tokens of `episodes[i]`, by i, one micro-batch after the other."""

    def likeliest(micro_batch: tuple[list[int], TokenBatch]) -> dict[int, TopK]:
        part, batch = micro_batch
        with torch.no_grad(), autocast(compute):
            hidden = counted_hidden(backbone_of(teacher), batch)
            top = top_distributions(hidden, head_of(teacher), vocabulary, k)
        logprobs = top.logprobs.cpu()
        require_finite({"teacher's log-probability": logprobs.sum().item()})
        pieces = zip(part, batch.split(top.ids.cpu().int()), batch.split(logprobs), strict=True)
        return {i: TopK(ids, own, vocabulary) for i, ids, own in pieces}

    return side_by_side(likeliest, _batches(episodes, teacher.device, compute), teacher.device)


@torch.no_grad()
def _errors(
    episodes: Sequence[Episode],
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    vocabulary: int,
    k: int,
    compute: ComputeConfig,
    divergence: Divergence,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return the divergence at each model token, and by how much it is more than from the stored ids."""
    full, errors = [], []
    for _, batch in _batches(episodes, teacher.device, compute):
        with autocast(compute):
            hidden = counted_hidden(backbone_of(teacher), batch)
            top = top_distributions(hidden, head_of(teacher), vocabulary, k)
            own = counted_hidden(backbone_of(student), batch)
            heads = head_of(student)[:vocabulary], head_of(teacher)[:vocabulary]
            exact = distillation_losses(own, heads[0], hidden, heads[1], batch.targets, divergence)[1]
            near = cached_losses(own, heads[0], top, batch.targets, divergence)[1]
        full.append(exact.cpu())
        errors.append((exact - near).cpu())
    return torch.cat(full), torch.cat(errors)


def _mass_outside(folder: Path, k: int) -> Float[Tensor, " N"]:
    """Return the teacher's mass outside of the stored ids at each model token of all files."""
    rests = []
    for path in _files(folder):
        flat = _read(path)["logprobs"].combine_chunks().flatten().to_numpy()
        rests.append(1 - np.exp(flat.reshape(-1, k)).sum(-1))
    return torch.from_numpy(np.concatenate(rests)).clamp(min=0)


class TeacherCache:
    """Finds stored distributions by episode."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        """Open the distributions in `folder`.

        Raise UserError when there are none, or when they belong to another tokenizer.
        """
        try:
            self.certificate = read_json(folder / CERTIFICATE, Certificate, "a certificate of distributions")
            table = pa.concat_tables(_read(path) for path in _files(folder))
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: no such file; run the stage distributions first") from None
        except (UserError, OSError, pa.ArrowException) as error:
            raise UserError(
                f"{folder}: no kept distributions; run the stage distributions again ({error})"
            ) from error
        if self.certificate.tokenizer != tokenizer_hash(tokenizer):
            raise UserError(f"{folder}: these distributions belong to another tokenizer than the student's")
        self._table = table
        self._rows = {key: row for row, key in enumerate(table["key"].to_pylist())}

    def get(self, episode: Episode) -> TopK | None:
        """Return the distributions, one row a model token; None for an episode that is not there."""
        row = self._rows.get(episode_key(episode))
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
    """Map a file into memory: processes that train side by side share it, and unused parts are not read."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _write(path: Path, episodes: Sequence[Episode], stored: list[TopK]) -> None:
    ids = [top.ids.flatten().numpy() for top in stored]
    logprobs = [top.logprobs.flatten().numpy() for top in stored]
    columns = {
        "key": pa.array([episode_key(episode) for episode in episodes]),
        "ids": pa.array(ids, pa.large_list(pa.int32())),
        "logprobs": pa.array(logprobs, pa.large_list(pa.float32())),
    }
    table = pa.table(columns)
    with replacement(path) as part, pa.ipc.new_file(str(part), table.schema) as writer:
        writer.write_table(table)


def _rounded(value: torch.Tensor) -> float:
    return float(f"{float(value):.6g}")
