"""What the comparisons of updates share: both sides' interface, and TRL's loss with an optimiser."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dgpo_core.agent.episode import Episode, Owner

STUDENT, TEACHER = "models/kd", "models/teacher"

# of TRL's trainers, which are given their batches and asked for a loss
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
}  # fmt: skip


class Update(Protocol):
    """One side of a comparison: an update by given episodes."""

    def gradient(self) -> Float[Tensor, " parameters"]:
        """Return the gradient of an update; the weights may change."""
        ...

    def step(self) -> object:
        """Update once."""
        ...


@dataclass(frozen=True)
class Comparison:
    """What makes both sides, from episodes; TRL's also from how many of them a batch has."""

    trainer: str  # TRL's class
    ours: Callable[[list[Episode]], Update]
    theirs: Callable[[list[Episode], int], Update]


@dataclass
class OurUpdate:
    """An update of ours: what adds up the gradients of its modules, and what does it all."""

    modules: list[torch.nn.Module]
    accumulate: Callable[[], object]
    step: Callable[[], object]

    def gradient(self) -> Float[Tensor, " parameters"]:
        self.accumulate()
        return taken_gradient(self.modules)


class TrlLoss(ABC):
    """TRL's loss over batches, with clipping and AdamW as ours."""

    def __init__(self, model: PreTrainedModel, batches: list[dict[str, Any]], settings: Any) -> None:
        """`settings` are those of the section with weight decay and the norm to clip at."""
        self.model, self._batches, self._max_norm = model, batches, settings.max_grad_norm
        model.train()  # TRL looks at the mode; there is no dropout
        self._optimizer = torch.optim.AdamW(model.parameters(), 1e-6, weight_decay=settings.weight_decay)

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> Float[Tensor, ""]:
        """Return TRL's loss of one batch; those of all batches add up to the update's."""

    def _accumulate(self) -> None:
        for batch in self._batches:
            self.loss(batch).backward()

    def gradient(self) -> Float[Tensor, " parameters"]:
        self._accumulate()
        return taken_gradient([self.model])

    def step(self) -> None:
        self._accumulate()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()


def taken_gradient(modules: Iterable[torch.nn.Module], clear: bool = True) -> Float[Tensor, " parameters"]:
    """Return all gradients in a row, and clear them."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters if clear else ():
        parameter.grad = None
    return gradient


def prompt_length(episode: Episode) -> int:
    return sum(owner == Owner.PROMPT for owner in episode.owners)


def trl_batches(
    episodes: list[Episode], rows: int, extra: Callable[[int], dict[str, Tensor]] = lambda _: {}
) -> list[dict[str, Any]]:
    """Return batches as TRL's own collation would make them: prompts padded on the left, completions right.

    `extra` gives more of an episode: tensors of its completion's tokens, or numbers.
    """
    total = torch.tensor(float(sum(episode.model_tokens for episode in episodes)))
    batches = []
    for start in range(0, len(episodes), rows):
        chosen = range(start, min(start + rows, len(episodes)))
        ids = [torch.tensor(episodes[i].token_ids) for i in chosen]
        cuts = [prompt_length(episodes[i]) for i in chosen]
        own = [torch.tensor([float(o == Owner.MODEL) for o in episodes[i].owners]) for i in chosen]
        prompts = [row[:cut] for row, cut in zip(ids, cuts, strict=True)]
        completions = [row[cut:] for row, cut in zip(ids, cuts, strict=True)]
        more = [extra(i) for i in chosen]
        batch = {
            "prompt_ids": pad_left(prompts),
            "prompt_mask": pad_left([torch.ones_like(row) for row in prompts]),
            "completion_ids": pad_right(completions),
            "completion_mask": pad_right([torch.ones_like(row) for row in completions]),
            "tool_mask": pad_right([row[cut:] for row, cut in zip(own, cuts, strict=True)]),
            "num_items_in_batch": total,
        }
        for key in more[0]:
            values = [one[key] for one in more]
            batch[key] = pad_right(values) if values[0].ndim else torch.stack(values)
        batches.append(batch)
    return batches


def pad_left(parts: list[Tensor], value: float = 0) -> Tensor:
    return pad_sequence(parts, batch_first=True, padding_value=value, padding_side="left")


def pad_right(parts: list[Tensor], value: float = 0) -> Tensor:
    return pad_sequence(parts, batch_first=True, padding_value=value)


def scratch() -> str:
    """Return a folder for what a trainer would write."""
    return tempfile.mkdtemp()
