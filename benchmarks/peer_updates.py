"""Updates beside TRL's, for `make bench`.

One mini-batch of GRPO, the same episodes for both: forward and backward over all of them, clipping and AdamW.
TRL's GRPOTrainer gets them as its own collation would make them, prompts padded on the left and completions
on the right, `rows` at a time (`per_device_train_batch_size`, the rest is accumulated). Before anything is
timed, the two gradients are compared.
"""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from benchmarks.alternation import Rounds, alternate
from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.config.params import load_params
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.training.episode_sources import usable
from dgpo_core.training.reinforce import ExperienceMaker, GRPOExperience, Reinforcer, Updater
from tasks.stages.inputs import retriever
from tasks.stages.rollouts import split_tasks, training_loop, training_rollout

GRPO = Reinforcement(start="kd", algorithm="grpo", guidance="none", reference="none")


def episodes_of(source: str, count: int) -> list[Episode]:
    """Return `count` episodes that the model samples, five of a question."""
    params, tokenizer = load_params(), load_tokenizer(source)
    loop = training_loop(params, load_model(source), source, tokenizer, retriever(params))
    rollout = training_rollout(loop, split_tasks(params, "train", 0), params.reinforce.sampling, 0)
    return usable(rollout([question // 5 for question in range(count)], 0))


def ours(source: str, episodes: list[Episode]) -> tuple[PreTrainedModel, GRPOExperience, Updater]:
    """Return a model, what its update learns from, and the updater."""
    params = load_params()
    config = params.reinforce.model_copy(update={"entropy_weight": 0.0, "beta": 0.0})
    model = load_model(source)
    trainer = Reinforcer(model, None, GRPO, config, params.compute, 0)
    actor, _, _ = trainer._engines()
    experience = ExperienceMaker(actor, None, None, GRPO, config, params.compute).make(episodes)
    assert isinstance(experience, GRPOExperience)
    return model, experience, Updater(actor, None, config, params.compute)


class TrlUpdate:
    """TRL's loss and optimiser over given episodes."""

    def __init__(self, source: str, episodes: list[Episode], experience: GRPOExperience, rows: int) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        params = load_params()
        self.model, self._rows = load_model(source), rows
        self.model.train()  # TRL looks at the mode; there is no dropout
        arguments = GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], beta=0.0,
            loss_type="dapo", epsilon=params.reinforce.clip,
            temperature=params.reinforce.sampling.temperature,
            per_device_train_batch_size=2, num_generations=2, gradient_checkpointing=False,
        )  # fmt: skip
        self._trainer = GRPOTrainer(
            model=self.model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "?"}] * 2),
            processing_class=copy.deepcopy(load_tokenizer(source)),
        )
        self._trainer.current_gradient_accumulation_steps = 1
        config = params.reinforce
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), config.actor_learning_rate, weight_decay=config.weight_decay
        )
        self._max_norm = config.max_grad_norm
        self._batches = [self._batch(episodes, experience, i) for i in range(0, len(episodes), rows)]

    def _batch(self, episodes: list[Episode], experience: GRPOExperience, start: int) -> dict[str, Any]:
        chosen = range(start, min(start + self._rows, len(episodes)))
        prompts, completions, tools, advantages, old = [], [], [], [], []
        for i in chosen:
            episode = episodes[i]
            cut = sum(owner == Owner.PROMPT for owner in episode.owners)
            prompts.append(torch.tensor(episode.token_ids[:cut]))
            completions.append(torch.tensor(episode.token_ids[cut:]))
            tools.append(torch.tensor([float(owner == Owner.MODEL) for owner in episode.owners[cut:]]))
            advantages.append(experience.advantages[i][0])
            old.append(torch.tensor(episode.logprobs[cut:]))
        ones = [torch.ones_like(ids) for ids in prompts], [torch.ones_like(ids) for ids in completions]
        return {
            "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
            "prompt_mask": pad_sequence(ones[0], batch_first=True, padding_side="left"),
            "completion_ids": _right(completions),
            "completion_mask": _right(ones[1]),
            "tool_mask": _right(tools),
            "advantages": torch.stack(advantages),
            "old_per_token_logps": _right(old),
            "num_items_in_batch": torch.tensor(
                float(sum(len(experience.old_logprobs[i]) for i in range(len(episodes))))
            ),
        }

    def gradient(self) -> None:
        """Add up the gradient of all batches."""
        for batch in self._batches:
            self._trainer._compute_loss(self.model, batch).backward()

    def step(self) -> None:
        """Update once."""
        self.gradient()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()


def _right(parts: list[torch.Tensor]) -> torch.Tensor:
    return pad_sequence(parts, batch_first=True)


def compare(source: str, count: int, rounds: int, rows: tuple[int, ...]) -> tuple[Rounds, float]:
    """Time both on `count` episodes. Return the times, and the relative difference of the gradients."""
    episodes = episodes_of(source, count)
    model, experience, updater = ours(source, episodes)
    everything = list(range(len(episodes)))
    peers = {f"TRL's GRPOTrainer, {n} a batch": TrlUpdate(source, episodes, experience, n) for n in rows}
    updater._actor_gradient(experience, everything)
    own = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    peer = next(iter(peers.values()))
    peer.gradient()
    theirs = torch.cat([p.grad.flatten() for p in peer.model.parameters() if p.grad is not None])
    peer.model.zero_grad()
    difference = float((own - theirs).norm() / own.norm())
    contenders: dict[str, Callable[[], object]] = {"ours": lambda: updater._step(experience, everything)}
    contenders |= {name: peer.step for name, peer in peers.items()}
    name = f"GRPO's update of {len(episodes)} episodes"
    return alternate(name, contenders, rounds, len(episodes), "episode"), difference
