"""Training engines: who holds a module's weights and optimiser state, and who adds up gradients.

Plain torch holds everything in every process; DeepSpeed splits it (`compute.zero_stage`). A trainer sees one
interface, whatever the engine and the number of processes.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from dgpo_core.config.training import ComputeConfig
from dgpo_core.training.batches import Result, Terms, TokenBatch, backbone_of, counted_hidden, head_of
from dgpo_core.training.optimizer import Schedule, Stepper, adamw
from dgpo_core.training.parallel import add_gradients, autocast


@dataclass(frozen=True)
class Optimization:
    """AdamW's settings; `schedule` is a factor on the learning rate by update."""

    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    schedule: Schedule


class TrainingEngine(Protocol):
    """A module under training. Every method is called by all processes, in the same order."""

    @property
    def device(self) -> torch.device: ...

    @property
    def learning_rate(self) -> float:
        """At the next update."""
        ...

    @property
    def lockstep(self) -> bool:
        """Whether processes must make equally many passes: weights or gradients travel in each."""
        ...

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward, in the precision of compute."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add this process's share of the gradient: the shares of all passes and processes are summed."""
        ...

    def step(self) -> float:
        """Clip, update, clear; returns the gradient's norm before clipping.

        With a norm that is nan or infinite the engine is spent: stop, and save nothing of it.
        """
        ...

    def publish(self) -> None:
        """Put the current weights, whole, into the module that the engine was made of, for rollouts."""
        ...

    def finish(self) -> None:
        """Put the trained weights, whole and in float32, into that module; the engine is spent."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Trained weights, optimiser and schedule, whole: any number of processes can go on from it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def training_engine(
    module: torch.nn.Module, how: Optimization, compute: ComputeConfig, published: bool = True
) -> TrainingEngine:
    """The engine that `compute` names, around `module`, whose trainable parameters (float32) it updates.

    `published` says whether `publish` and `finish` will be asked for.
    """
    if compute.engine == "deepspeed":
        from dgpo_core.training.deepspeed_engine import ZeroEngine

        return ZeroEngine(module, how, compute, published)
    return TorchEngine(module, how, compute)


class TorchEngine:
    """Everything in every process; float32 weights, computing in bfloat16 under autocast."""

    lockstep = False

    def __init__(self, module: torch.nn.Module, how: Optimization, compute: ComputeConfig) -> None:
        self.module, self._compute = module, compute
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.device = trained[0].device
        self._stepper = Stepper(
            adamw(trained, how.learning_rate, how.weight_decay),
            schedule=how.schedule,
            max_grad_norm=how.max_grad_norm,
        )

    @property
    def learning_rate(self) -> float:
        return self._stepper.learning_rate

    def __call__(self, *inputs: Any) -> Any:
        with autocast(self._compute):
            return self.module(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        add_gradients(self.module)
        return self._stepper.step()

    def publish(self) -> None:
        """The module is the one that is trained."""

    def finish(self) -> None:
        self.module.float()

    def state_dict(self) -> dict[str, Any]:
        weights = {name: p.data for name, p in self.module.named_parameters() if p.requires_grad}
        return {"weights": weights, "stepper": self._stepper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(state["weights"][name])
        self._stepper.load_state_dict(state["stepper"])


class FrozenModel:
    """A language model that is only asked: the teacher, or the model that training starts from.

    Its distributions are over the first `vocabulary` ids; None: over all that it has rows for.
    """

    def __init__(self, model: PreTrainedModel, compute: ComputeConfig, vocabulary: int | None = None) -> None:
        self._compute = compute
        if compute.engine == "deepspeed":
            from dgpo_core.training.deepspeed_engine import held_frozen

            self.backbone, head = held_frozen(model, compute)
        else:
            self.backbone, head = backbone_of(model), head_of(model).detach()
        self.head = head[:vocabulary]

    @torch.no_grad()
    def __call__(self, batch: TokenBatch, terms: Terms[Result]) -> Result:
        """`terms` of the counted tokens."""
        with autocast(self._compute):
            return terms(counted_hidden(self.backbone, batch), self.head)

    @torch.no_grad()
    def hidden(self, batch: TokenBatch) -> torch.Tensor:
        """[N, H] at the positions that predict the counted tokens."""
        with autocast(self._compute):
            return counted_hidden(self.backbone, batch)
