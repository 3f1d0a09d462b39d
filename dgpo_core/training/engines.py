"""Training engines: who holds a module's weights and optimiser state, and who adds up gradients.

Plain torch holds everything in every process; DeepSpeed splits it (`compute.zero_stage`). A trainer sees one
interface, whatever the engine and the number of processes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dgpo_core.config.training import ComputeConfig
from dgpo_core.errors import NotFinite
from dgpo_core.objectives.logprobs import PerToken
from dgpo_core.threads import available_threads, side_by_side
from dgpo_core.training.batches import (
    HeadFunction,
    TokenBatch,
    TokenSequence,
    backbone_of,
    collate,
    counted_hidden,
    head_of,
    micro_batches,
)
from dgpo_core.training.checkpoint import Weights, put_weights, require_finite, trainable
from dgpo_core.training.optimizer import Optimization, Stepper, adamw
from dgpo_core.training.parallel import add_gradients, all_sum, autocast, gather, padded_share

Item = TypeVar("Item")
Result = TypeVar("Result")
Figures = dict[str, float]


class TrainingEngine(Protocol):
    """A module under training. Every method is called by all processes, in the same order."""

    updates: int  # that this process has begun

    @property
    def device(self) -> torch.device: ...

    @property
    def learning_rate(self) -> float:
        """Return the rate of the next update."""
        ...

    @property
    def lockstep(self) -> bool:
        """Return whether processes must make equally many calls: weights or gradients travel in each."""
        ...

    def __call__(self, *inputs: Any) -> Any:
        """Run the module's forward, in the precision of compute."""
        ...

    def accumulate(
        self, loss: Callable[[Item], tuple[Float[Tensor, ""], Result]], items: Iterable[Item]
    ) -> list[Result]:
        """Add up the gradients of the losses of all items; return what comes with each loss, in order.

        Those of all processes are summed by `step`.
        """
        ...

    def step(self) -> float:
        """Clip, update and clear; return the gradient's norm before clipping.

        A norm that is nan or infinite updates nothing, or spends the engine.
        """
        ...

    def discard(self) -> None:
        """Forget the gradients that were added up."""
        ...

    @property
    def spent(self) -> bool:
        """Return whether an update has gone wrong that it cannot do without: stop, and save nothing of it."""
        ...

    def publish(self) -> None:
        """Put the current weights, whole, into the module that the engine was made of, for rollouts."""
        ...

    def weights(self) -> Weights:
        """Return copies of what is trained, whole and in float32; only the first process need have them."""
        ...

    def finish(self, weights: Weights | None = None) -> None:
        """Put the trained weights, or these, whole and in float32, into that module; the engine is spent."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimiser and schedule, whole: any number of processes can go on from them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def training_engine(
    module: torch.nn.Module, how: Optimization, compute: ComputeConfig, published: bool = True
) -> TrainingEngine:
    """Put the engine that `compute` names around `module`, whose trainable parameters (float32) it updates.

    `published` says whether `publish` and `finish` will be called.
    """
    if compute.engine == "deepspeed":
        from dgpo_core.training.deepspeed_engine import ZeroEngine

        return ZeroEngine(module, how, compute, published)
    return TorchEngine(module, how, compute)


def update(engine: TrainingEngine, losses: Figures, norm: str) -> Figures:
    """Update by the gradients of these losses; return them with the gradient's norm, by that name.

    Raise NotFinite, and update nothing, where one of these figures is nan or infinite.
    """
    try:
        require_finite(losses)
    except NotFinite:
        engine.discard()
        raise
    found = {norm: engine.step()}
    require_finite(found)
    return losses | found


MicroBatch = tuple[list[int], TokenBatch, bool]


def token_batches(
    engine: TrainingEngine, sequences: list[TokenSequence], max_tokens: int
) -> Iterator[MicroBatch]:
    """Yield this process's micro-batches of at most `max_tokens` padded tokens (or one sequence) each.

    With each come the indices of its sequences, and whether it counts: an engine in lockstep is also given
    micro-batches that do not (`padded_share`), whose loss must be 0.
    """
    parts = micro_batches([len(sequence.ids) for sequence in sequences], max_tokens)
    for part, counts in padded_share(parts, engine.lockstep):
        yield part, collate([sequences[i] for i in part], engine.device), counts


def each_sequence(
    engine: TrainingEngine,
    sequences: list[TokenSequence],
    max_tokens: int,
    function: Callable[[TokenBatch], Float[Tensor, " N"]],
) -> list[Float[Tensor, " tokens"]]:
    """Apply a function of a micro-batch; return one CPU tensor a sequence, in order, in every process."""

    def values(micro_batch: MicroBatch) -> tuple[list[int], list[Tensor]] | None:
        part, batch, counts = micro_batch
        found = batch.split(function(batch).float().cpu())
        return (part, found) if counts else None

    found = side_by_side(values, token_batches(engine, sequences, max_tokens), engine.device)
    results: dict[int, Tensor] = {}
    for part, tensors in gather([pair for pair in found if pair is not None]):
        results.update(zip(part, tensors, strict=True))
    return [results[i] for i in range(len(sequences))]


def summed(
    engine: TrainingEngine,
    sequences: list[TokenSequence],
    max_tokens: int,
    names: Iterable[str],
    loss: Callable[[list[int], TokenBatch], tuple[Float[Tensor, ""], Figures]],
) -> Figures:
    """Add up the gradients of a loss over all sequences; return the sums of the figures that it names.

    `loss` gets the indices of a micro-batch's sequences and the micro-batch. Without grad mode there are
    only the figures.
    """

    def counted(micro_batch: MicroBatch) -> tuple[Float[Tensor, ""], Figures]:
        part, batch, counts = micro_batch
        value, figures = loss(part, batch)
        return (value, figures) if counts else (0 * value, {})

    micro_batches_ = token_batches(engine, sequences, max_tokens)
    if torch.is_grad_enabled():
        found = engine.accumulate(counted, micro_batches_)
    else:
        found = [figures for _, figures in side_by_side(counted, micro_batches_, engine.device)]
    return all_sum({name: sum(figures.get(name, 0.0) for figures in found) for name in names})


class TorchEngine:
    """Holds everything in every process: float32 weights, which compute in bfloat16 under autocast."""

    lockstep = False
    spent = False

    def __init__(self, module: torch.nn.Module, how: Optimization, compute: ComputeConfig) -> None:
        self.module, self._compute, self.updates = module, compute, 0
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.device = self._trained[0].device
        self._stepper = Stepper(
            adamw(self._trained, how.learning_rate, how.weight_decay),
            schedule=how.schedule,
            max_grad_norm=how.max_grad_norm,
        )

    @property
    def learning_rate(self) -> float:
        return self._stepper.learning_rate

    def __call__(self, *inputs: Any) -> Any:
        with autocast(self._compute):
            return self.module(*inputs)

    def accumulate(
        self, loss: Callable[[Item], tuple[Float[Tensor, ""], Result]], items: Iterable[Item]
    ) -> list[Result]:
        # checkpointing sets the module's mode for the time of a forward: one at a time
        alone = any(getattr(part, "is_gradient_checkpointing", False) for part in self.module.modules())
        if alone or self.device.type != "cpu" or available_threads() == 1:
            return [self._backward(*loss(item)) for item in items]

        def gradient(item: Item) -> tuple[tuple[Tensor | None, ...], Result]:
            value, result = loss(item)
            return torch.autograd.grad(value, self._trained, allow_unused=True), result

        results = []
        for gradients, result in side_by_side(gradient, items, self.device):
            for parameter, own in zip(self._trained, gradients, strict=True):
                if own is not None:
                    parameter.grad = own if parameter.grad is None else parameter.grad.add_(own)
            results.append(result)
        return results

    @staticmethod
    def _backward(value: Float[Tensor, ""], result: Result) -> Result:
        value.backward()
        return result

    def step(self) -> float:
        add_gradients(self.module)
        self.updates += 1
        return self._stepper.step()

    def discard(self) -> None:
        self._stepper.clear()

    def publish(self) -> None:
        """Do nothing: the module is the one that is trained."""

    def weights(self) -> Weights:
        return {name: p.data.to("cpu", copy=True) for name, p in trainable(self.module)}

    def finish(self, weights: Weights | None = None) -> None:
        self.module.float()
        if weights is not None:
            put_weights(self.module, weights)

    def state_dict(self) -> dict[str, Any]:
        weights = {name: parameter.data for name, parameter in trainable(self.module)}
        return {"weights": weights, "stepper": self._stepper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        put_weights(self.module, state["weights"])
        self._stepper.load_state_dict(state["stepper"])


class FrozenModel:
    """Holds a language model that is not trained: the teacher, or the model that training starts from.

    Its distributions are over the first `vocabulary` ids; None: over all that it has rows for.
    """

    def __init__(self, model: PreTrainedModel, compute: ComputeConfig, vocabulary: int | None = None) -> None:
        self._compute = compute
        if compute.engine == "deepspeed":
            from dgpo_core.training.deepspeed_engine import frozen_parts

            self.backbone, head = frozen_parts(model, compute)
        else:
            self.backbone, head = backbone_of(model), head_of(model).detach()
        self.head: Float[Tensor, "V H"] = head[:vocabulary]

    @torch.no_grad()
    def __call__(self, batch: TokenBatch, function: HeadFunction) -> PerToken:
        """Call `function` with the counted tokens' hidden states and the output embedding."""
        with autocast(self._compute):
            return function(counted_hidden(self.backbone, batch), self.head)

    @torch.no_grad()
    def hidden(self, batch: TokenBatch) -> Float[Tensor, "N H"]:
        """Return the last hidden states at the positions that predict the counted tokens."""
        with autocast(self._compute):
            return counted_hidden(self.backbone, batch)
