"""Neither the order of a batch's episodes nor their cut into micro-batches changes a step."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.config.training import ReinforceConfig
from dgpo_core.training.batches import Critic
from dgpo_core.training.guidance import GuidanceLoss
from dgpo_core.training.reinforce import Experience, ExperienceMaker, PPOExperience, Updater
from tests.dgpo_core.making import engines, exact, random_episode, reinforcement, student_teacher_critic

Parts = tuple[PreTrainedModel, PreTrainedModel, Critic]
Scope = Literal["model_tokens", "all"]
COUNT = 8


@pytest.fixture(scope="module")
def parts(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """The tests leave them as they are."""
    return student_teacher_critic(tokenizer)


def sampled(number: int) -> Episode:
    """Two questions of four episodes, two of which are correct; sampled nearly as the student would have."""
    episode = random_episode(number, correct=number % 2 == 0)
    logprobs = [
        logprob - 6 if owner == Owner.MODEL else 0.0
        for logprob, owner in zip(episode.logprobs, episode.owners, strict=True)
    ]
    return replace(episode, question_id=f"q{number // 4}", logprobs=logprobs)


EPISODES = [sampled(number) for number in range(COUNT)]


SOD: dict[str, Any] = {"placement": "loss", "divergence": "reverse_kl", "weight": 0.5, "turns": "sod"}


@dataclass(frozen=True)
class Step:
    """What one step computes of its episodes, up to the gradients of its only mini-batch."""

    experience: Experience
    losses: list[float]
    gradients: list[torch.Tensor]


def step(
    parts: Parts, episodes: list[Episode], algorithm: str, scope: Scope, row: dict[str, Any], tokens: int
) -> Step:
    recipe = reinforcement(algorithm, **row)
    config = ReinforceConfig(
        beta=0.1, gae_scope=scope, audit_episodes=COUNT, entropy_weight=0.05, importance_cap=1.5,
        preserve_weight=0.3 if algorithm == "reinforce" else 0.0,
    )  # fmt: skip
    compute = exact(tokens)
    actor, reference, valued = engines(parts, compute)
    critic = valued if algorithm == "ppo" else None
    experience = ExperienceMaker(actor, reference, critic, recipe, config, compute).make(episodes)
    updater = Updater(actor, critic, config, compute, GuidanceLoss.of(recipe, reference))
    everyone = list(range(COUNT))
    losses = list(updater._actor_gradient(experience, everyone).values())
    if critic is not None and isinstance(experience, PPOExperience):
        losses.append(updater._critic_gradient(critic, experience, everyone))
    trained = [*parts[0].parameters(), *parts[2].parameters()]
    gradients = [p.grad.clone() for p in trained if p.grad is not None]
    for parameter in trained:
        parameter.grad = None
    return Step(experience, losses, gradients)


def by_episode(experience: Experience, order: list[int]) -> list[list[torch.Tensor]]:
    """Every quantity of every episode, by its number; `order` has the numbers as they were given."""
    names = ("old_logprobs", "advantages", "values", "returns", "rewards", "sampled_logprobs")
    found: dict[int, list[torch.Tensor]] = {number: [] for number in order}
    for name in names:
        if values := getattr(experience, name, None):  # GRPO has no values and returns
            for number, own in zip(order, values, strict=True):
                found[number].append(own)
    for place, kl in [*experience.kl.items(), *experience.kl_outside.items()]:
        found[order[place]].append(kl)
    return [found[number] for number in range(COUNT)]


@pytest.mark.parametrize(
    ("algorithm", "scope", "row"),
    [
        ("ppo", "model_tokens", {}),
        ("ppo", "all", {}),
        ("grpo", "model_tokens", {}),
        ("ppo", "model_tokens", {"placement": "loss", "divergence": "reverse_kl", "weight": 0.5}),
        ("reinforce", "model_tokens", SOD),
    ],
)
@settings(max_examples=8)
@given(order=st.permutations(range(COUNT)), tokens=st.sampled_from([1, 60, 10_000]))
def test_a_step_does_not_depend_on_the_order_of_its_episodes(
    parts: Parts, algorithm: str, scope: Scope, row: dict[str, Any], order: list[int], tokens: int
) -> None:
    straight = step(parts, EPISODES, algorithm, scope, row, 10_000)
    permuted = step(parts, [EPISODES[number] for number in order], algorithm, scope, row, tokens)
    torch.testing.assert_close(
        by_episode(permuted.experience, order),
        by_episode(straight.experience, list(range(COUNT))),
        rtol=1e-4,
        atol=1e-5,
    )
    assert permuted.losses == pytest.approx(straight.losses, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(permuted.gradients, straight.gradients, rtol=1e-3, atol=1e-6)
    assert any(advantages.any() for advantages in straight.experience.advantages)
    assert max(gradient.abs().max() for gradient in straight.gradients) > 1e-3
