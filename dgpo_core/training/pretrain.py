"""Supervised training on weighted token examples: how the embedded base models are built."""

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dgpo_core.config.data import PhaseConfig
from dgpo_core.datasets.world.reading import Example
from dgpo_core.training import optimizer as optim
from dgpo_core.training.checkpoint import Checkpoint

CHECKPOINT_EVERY = 100


def train_on_examples(
    model: PreTrainedModel,
    config: PhaseConfig,
    batch: Callable[[int], list[Example]],
    checkpoint: Checkpoint,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """`config.steps` updates of `model` in place; `batch(step)` gives the examples of a step."""
    parameters = list(model.parameters())
    optimizer = optim.adamw(parameters, config.learning_rate, weight_decay=0.01)
    schedule = optim.scheduler(optimizer, optim.cosine(config.steps, config.warmup_steps))
    first = 0
    if state := checkpoint.load():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    model.train()
    for step in range(first, config.steps):
        loss = weighted_loss(model, batch(step))
        loss.backward()
        norm = optim.step(parameters, optimizer, schedule, max_grad_norm=1.0)
        report(step + 1, {"loss": loss.item(), "grad_norm": norm})
        if (step + 1) % CHECKPOINT_EVERY == 0:
            checkpoint.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step + 1,
                }
            )
    model.eval()


def weighted_loss(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    """Cross-entropy of each next token, averaged with the examples' weights; scalar, nats."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    weights = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.ids)] = torch.tensor(example.weights)
    device = model.device
    ids, weights = ids.to(device), weights.to(device)[:, 1:]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1]
        counted = weights > 0
        logits = model.get_output_embeddings()(hidden[counted])
    losses = cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
    return (losses * weights[counted]).sum() / weights.sum()
