"""Supervised training on weighted token examples."""

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dgpo_core.config.data import PhaseConfig
from dgpo_core.datasets.world.reading import Example
from dgpo_core.pretraining.muon import Muon
from dgpo_core.training import optimizer as optim
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.finite import require_finite, training_step

CHECKPOINT_EVERY = 100


def train_on_examples(
    model: PreTrainedModel,
    config: PhaseConfig,
    batch: Callable[[int], list[Example]],
    checkpoint: Checkpoint,
    report: Callable[[int, dict[str, float]], None],
    rows: int,
    precision: str,
) -> None:
    """`config.steps` updates of `model` in place; `batch(step)` gives the examples of a step.

    `rows` examples at a time go through the model: the same gradient as all at once, in less memory.
    Compute is in `precision`, "float32" or "bfloat16"; the weights are float32. When it continues from a
    checkpoint, the last finished step is reported again. Raises NotFinite at the first step whose loss or
    gradient is no number.
    """
    stepper = optim.Stepper(
        *_optimizers(model, config, precision),
        schedule=optim.trapezoid(config.steps, config.warmup_steps),
        max_grad_norm=1.0,
    )
    first = 0
    if state := checkpoint.load():
        model.load_state_dict(state["model"])
        stepper.load_state_dict(state["stepper"])
        first = state["step"]
        report(first, state["metrics"])
    model.train()
    for step in range(first, config.steps):
        with training_step(step + 1, lambda _: "learning_rate or matrix_learning_rate of this phase"):
            metrics = {"loss": _backward(model, batch(step), rows, precision), "grad_norm": stepper.step()}
            require_finite(metrics)
        report(step + 1, metrics)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == config.steps:
            checkpoint.save(
                {
                    "model": model.state_dict(),
                    "stepper": stepper.state_dict(),
                    "step": step + 1,
                    "metrics": metrics,
                }
            )
    model.eval()


def _optimizers(model: PreTrainedModel, config: PhaseConfig, precision: str) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embeddings and vectors.

    With AdamW alone, copying a value out of a passage takes several times as many steps to learn.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        Muon(
            matrices,
            config.matrix_learning_rate,
            weight_decay=0.01,
            dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32,
        ),
        torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=0.0),
    ]


def _backward(model: PreTrainedModel, examples: list[Example], rows: int, precision: str) -> float:
    """Add the gradient of the weighted loss of all `examples`, and return that loss."""
    total, loss = sum(_weight(examples)), 0.0
    for part in (examples[i : i + rows] for i in range(0, len(examples), rows)):
        share = weighted_loss(model, part, precision) * (sum(_weight(part)) / total)
        share.backward()
        loss += share.item()
    return loss


def _weight(examples: list[Example]) -> list[float]:
    """What each example counts in the loss: its first token is predicted from nothing."""
    return [sum(example.weights[1:]) for example in examples]


def weighted_loss(model: PreTrainedModel, examples: list[Example], precision: str) -> torch.Tensor:
    """Cross-entropy of each next token, averaged with the examples' weights; scalar, nats."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    weights = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.ids)] = torch.tensor(example.weights)
    device = model.device
    ids, weights = ids.to(device), weights.to(device)[:, 1:]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        counted = weights > 0
        logits = model.get_output_embeddings()(hidden[counted])
    losses = cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
    return (losses * weights[counted]).sum() / weights.sum()
