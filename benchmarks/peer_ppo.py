"""PPO beside TRL's last PPOTrainer (TRL 1.12.0): all of a step but sampling and the model of rewards.

TRL's `train` does one step: the reference's log-probabilities, values, advantages and one mini-batch. What it
would sample are the given episodes with their logits; its reward model gives exact match. It has no mask
for tokens of the environment, so here all tokens after the prompt count, for both sides. It also values the
state after the last one, which ours then has as a token of the environment. The teacher runs on all episodes.
"""

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.updates import (
    ARGUMENTS,
    STUDENT,
    TEACHER,
    Comparison,
    OurUpdate,
    pad_left,
    pad_right,
    prompt_length,
    scratch,
    taken_gradient,
)
from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.config.params import load_params
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ReinforceConfig
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.objectives.policy import whiten
from dgpo_core.training.batches import Critic
from dgpo_core.training.reinforce import ExperienceMaker, PPOExperience, Reinforcer, Updater

RECIPE = Reinforcement(start="kd", algorithm="ppo", guidance="uniform", reference="teacher")


def settings() -> ReinforceConfig:
    """Return the settings of both sides: TRL has no entropy in its loss."""
    config = load_params().reinforce
    changed: dict[str, Any] = {"entropy_weight": 0.0, "gae_scope": "all", "old_logprobs": "rollout"}
    return config.model_copy(update=changed)


def value_head(like: Float[Tensor, "1 H"]) -> Float[Tensor, "1 H"]:
    """Return the weights that both critics begin with; zeros would give the backbone no gradient."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).div(math.sqrt(like.shape[1]))


@torch.no_grad()
def logits_of(rows: Tensor, mask: Tensor, first: int, temperature: float) -> Float[Tensor, "B T V"]:
    """Return the student's logits of each token from `first` on, as sampling would have given them."""
    model, positions = load_model(STUDENT), mask.cumsum(1) - mask
    logits = model(input_ids=rows * mask, attention_mask=mask, position_ids=positions).logits
    found: Tensor = logits[:, first - 1 : -1] / temperature
    return found


def padded(episodes: list[Episode], pad: int) -> tuple[Tensor, int]:
    """Return prompts padded on the left and responses on the right, and where the latter begin."""
    cuts = [prompt_length(episode) for episode in episodes]
    prompts = pad_left([torch.tensor(e.token_ids[:n]) for e, n in zip(episodes, cuts, strict=True)], pad)
    # one more, so that every response ends before its row does
    responses = pad_right(
        [torch.tensor([*e.token_ids[n:], pad]) for e, n in zip(episodes, cuts, strict=True)], pad
    )
    return torch.cat([prompts, responses], 1), prompts.shape[1]


def all_counting(episodes: list[Episode], pad: int) -> list[Episode]:
    """Return the episodes with all tokens after the prompt as the model's, and one of the environment's."""
    rows, first = padded(episodes, pad)
    logits = logits_of(rows, (rows != pad).long(), first, settings().sampling.temperature)
    found = logits.log_softmax(-1).gather(-1, rows[:, first:, None])[..., 0]
    changed = []
    for episode, logprobs in zip(episodes, found, strict=True):
        cut = prompt_length(episode)
        length = len(episode.token_ids) - cut
        changed.append(
            replace(
                episode,
                token_ids=[*episode.token_ids, pad],
                owners=[*[int(Owner.PROMPT)] * cut, *[int(Owner.MODEL)] * length, Owner.ENVIRONMENT],
                logprobs=[0.0] * cut + logprobs[:length].tolist() + [0.0],
            )
        )
    return changed


def ours(episodes: list[Episode]) -> OurUpdate:
    """Return our side."""
    params, config, model = load_params(), settings(), load_model(STUDENT)
    learned = all_counting(episodes, load_tokenizer(STUDENT).pad_token_id)
    reinforcer = Reinforcer(model, load_model(TEACHER), RECIPE, config, params.compute, 0)
    actor, reference, critic = reinforcer._engines()
    value_model = critic.module  # type: ignore[union-attr]
    assert isinstance(value_model, Critic)
    value_model.head.weight.data.copy_(value_head(value_model.head.weight))
    maker = ExperienceMaker(actor, reference, critic, RECIPE, config, params.compute)
    updater, everything = Updater(actor, critic, config, params.compute), list(range(len(learned)))

    def accumulate() -> None:
        experience = maker.make(learned)
        assert isinstance(experience, PPOExperience) and critic is not None
        # TRL whitens over the response alone
        mask = pad_right([torch.ones(len(own)) for own in experience.advantages])
        scaled = whiten(pad_right(experience.advantages), mask)
        advantages = [row[: len(own)] for row, own in zip(scaled, experience.advantages, strict=True)]
        updater._actor_gradient(replace(experience, advantages=advantages), everything)
        updater._critic_gradient(critic, experience, everything)

    return OurUpdate(
        [model, value_model.backbone], accumulate, lambda: updater.update(maker.make(learned), everything)
    )


class Theirs:
    """TRL's side."""

    def __init__(self, episodes: list[Episode], rows: int) -> None:
        from datasets import Dataset
        from transformers import AutoModelForSequenceClassification
        from trl.experimental import ppo

        config, tokenizer, count = settings(), load_tokenizer(STUDENT), len(episodes)
        temperature = config.sampling.temperature
        sampled, first = padded(episodes, tokenizer.pad_token_id)
        mask = (sampled != tokenizer.pad_token_id).long()
        self._sampled = sampled, logits_of(sampled, mask, first, temperature)
        self._scores = torch.tensor([float(e.correct) for e in episodes]).split(rows)
        critic = AutoModelForSequenceClassification.from_pretrained(STUDENT, num_labels=1)
        critic.score.weight.data.copy_(value_head(critic.score.weight))
        policy, self._reward_model = load_model(STUDENT), torch.nn.Identity()
        self._modules = [policy, critic.base_model]
        parameters = [*policy.parameters(), *critic.parameters()]
        self._optimizer = torch.optim.AdamW(parameters, 1e-6, weight_decay=config.weight_decay)
        arguments = ppo.PPOConfig(
            output_dir=scratch(), num_ppo_epochs=1, num_mini_batches=1, total_episodes=count,
            gradient_accumulation_steps=count // rows, local_rollout_forward_batch_size=rows,
            response_length=1, temperature=temperature, kl_coef=config.beta, kl_estimator="k1",
            cliprange=config.clip, cliprange_value=config.value_clip, vf_coef=2 * config.value_loss_weight,
            gamma=config.gamma, lam=config.lam, missing_eos_penalty=None, num_sample_generations=0,
            save_strategy="no", disable_tqdm=True,
            **ARGUMENTS | {"per_device_train_batch_size": rows},
        )  # fmt: skip
        self._trainer = ppo.PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=policy,
            ref_model=load_model(TEACHER),
            reward_model=self._reward_model,
            value_model=critic,
            train_dataset=Dataset.from_list([{"input_ids": [0] * first}] * count),
            optimizers=(self._optimizer, torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda _: 1.0)),
        )

    def gradient(self) -> Float[Tensor, " parameters"]:
        found: list[Tensor] = []
        note = self._optimizer.register_step_pre_hook(
            lambda *_: found.append(taken_gradient(self._modules, clear=False))
        )
        self.step()
        note.remove()
        return found[0]

    def step(self) -> None:
        from trl.experimental.ppo import ppo_trainer

        rewards, scores = ppo_trainer.get_reward, iter(self._scores)

        def reward(model: torch.nn.Module, *given: Any) -> Any:
            return (None, next(scores), None) if model is self._reward_model else rewards(model, *given)

        with (
            patch.object(ppo_trainer, "batch_generation", lambda *_: self._sampled),
            patch.object(ppo_trainer, "get_reward", reward),
        ):
            self._trainer.train()


PPO = Comparison("PPOTrainer", ours, Theirs)
