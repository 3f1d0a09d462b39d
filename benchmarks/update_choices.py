"""What the update does otherwise than it could: `python -m benchmarks.update_choices` (after the demo).

By 64 episodes: a mini-batch of PPO with a critic of its own, beside a critic on the actor's backbone; and the
backbone's forward and backward passes over padded sequences of like lengths, beside sequences packed in rows
with a block-diagonal mask, which transformers makes of the positions. Fills its part of docs/benchmarks.md.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.alternation import alternate, fill, table
from benchmarks.peer_updates import COUNT, RETURNS, peak, sampled
from benchmarks.updates import STUDENT, TEACHER
from dgpo_core.agent.episode import Episode, read_episodes, write_episodes
from dgpo_core.config.params import load_params
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.models import load_model
from dgpo_core.objectives.policy import clipped_surrogate, value_loss
from dgpo_core.threads import single_threaded
from dgpo_core.training.batches import (
    TokenBatch,
    TokenModel,
    collate,
    counted_hidden,
    micro_batches,
    model_sequence,
    policy_function,
)
from dgpo_core.training.engines import summed, training_engine
from dgpo_core.training.reinforce import ExperienceMaker, PPOExperience, Reinforcer, Updater, _flat

RECIPE = Reinforcement(start="kd", algorithm="ppo", guidance="selective", reference="teacher")
SEPARATE, SHARED = "ours: the critic has its own backbone", "the critic has the actor's"
PADDED, PACKED = "ours: padded, like lengths", "packed, block-diagonal mask"


class SharedModel(torch.nn.Module):
    """Gives log-probabilities and entropies, and values by a head on the same backbone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.policy = TokenModel(model)
        self.value = torch.nn.Linear(model.config.hidden_size, 1)

    def forward(self, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        hidden = counted_hidden(self.policy.backbone, batch)
        logprobs, entropy = self.policy.head(hidden, policy_function(batch, temperature))
        return logprobs, entropy, self.value(hidden)[:, 0]


def updates(episodes: list[Episode], shared: bool) -> Callable[[], object]:
    """Return one mini-batch's update, made of a fresh student."""
    params = load_params()
    config, limit, model = params.reinforce, params.compute.micro_batch_tokens, load_model(STUDENT)
    reinforcer = Reinforcer(model, load_model(TEACHER), RECIPE, config, params.compute, 0)
    actor, reference, critic = reinforcer._engines()
    made = ExperienceMaker(actor, reference, critic, RECIPE, config, params.compute).make(episodes)
    assert isinstance(made, PPOExperience)
    if not shared:
        updater = Updater(actor, critic, config, params.compute)
        return lambda: updater.update(made, list(range(len(episodes))))
    how = reinforcer._optimization(config.actor_learning_rate, config.actor_learning_rate_warmup)
    both, tokens = training_engine(SharedModel(model), how, params.compute), sum(map(len, made.old_logprobs))

    def loss(part: list[int], batch: TokenBatch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        logprobs, entropy, values = both(batch, config.sampling.temperature)
        old, advantages = _flat(made.old_logprobs, part), _flat(made.advantages, part)
        policy, _ = clipped_surrogate(logprobs, old, advantages, config.clip)
        returns, before = _flat(made.returns, part), _flat(made.values, part)
        squares = value_loss(values, before, returns, config.value_clip)
        losses = policy - config.entropy_weight * entropy + config.value_loss_weight * squares
        return losses.sum() / tokens, {}

    def update() -> None:
        summed(both, made.sequences, limit, [], loss)
        both.step()

    return update


def passes(episodes: list[Episode], packed: bool) -> Callable[[], None]:
    """Return a forward and backward pass of the backbone over all episodes, a row or batch at a time."""
    backbone, limit = load_model(STUDENT).base_model, load_params().compute.micro_batch_tokens
    parts = list(micro_batches([len(episode.token_ids) for episode in episodes], limit))
    inputs = []
    for part in parts:
        if packed:
            rows = [torch.tensor(episodes[i].token_ids) for i in part]
            positions = torch.cat([torch.arange(len(row)) for row in rows])
            inputs.append({"input_ids": torch.cat(rows)[None], "position_ids": positions[None]})
        else:
            sequences = [model_sequence(episodes[i]) for i in part]
            inputs.append({"input_ids": collate(sequences, torch.device("cpu")).ids})

    def run() -> None:
        for one in inputs:
            backbone(**one, use_cache=False).last_hidden_state.sum().backward()
        backbone.zero_grad()

    return run


def memory(episodes: list[Episode], shared: bool) -> float:
    """Measure how far memory rises in two updates, the optimiser's states included and weights not, MiB."""
    update = updates(episodes, shared)
    gc.collect()
    with peak() as growth:
        update()
        update()
    return growth[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs=2, metavar=("EPISODES", "SHARED"), help="measure one memory only")
    given = parser.parse_args()
    if given.memory:
        path, shared = given.memory
        print(json.dumps(memory(read_episodes(Path(path)), shared == SHARED)))
        return
    episodes, peaks = sampled(STUDENT, COUNT), {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "episodes.parquet"
        write_episodes(path, episodes)
        for name in (SEPARATE, SHARED):
            command = [sys.executable, "-m", "benchmarks.update_choices", "--memory", str(path), name]
            environment = os.environ | RETURNS
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            peaks[name] = json.loads(done.stdout.splitlines()[-1])
    critics = {SEPARATE: updates(episodes, False), SHARED: updates(episodes, True)}
    layouts = {PADDED: passes(episodes, False), PACKED: passes(episodes, True)}
    updated = alternate("PPO's mini-batch", critics, given.rounds, COUNT, "episode")
    with single_threaded():
        passed = alternate("backbone's passes", layouts, given.rounds, COUNT, "episode")
    told = ", ".join(f"{name}: {value:.0f} MiB" for name, value in peaks.items())
    written = f"{table([updated, passed])}\n\nAn update's memory without weights, {told}."
    fill("choices", written)
    print(written)


if __name__ == "__main__":
    main()
