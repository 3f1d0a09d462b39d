"""Prompt and environment tokens are context only: no reward, no KL, no advantage, no gradient.

Hidden states that do not predict a token of the model are made nan. Were one of them used, the results would
be nan too; they are those of the untouched models.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.config.training import DistillConfig, DistributionsConfig, ReinforceConfig
from dgpo_core.training.batches import Critic
from dgpo_core.training.distill import Distiller
from dgpo_core.training.episode_sources import TeacherEpisodes
from dgpo_core.training.guidance import GuidanceLoss
from dgpo_core.training.reinforce import Experience, ExperienceMaker, PPOExperience, Updater
from dgpo_core.training.teacher_cache import TeacherCache, build_cache
from tests.dgpo_core.making import (
    distillation,
    engines,
    exact,
    gradients,
    random_episode,
    reinforcement,
    student_teacher_critic,
)

Parts = tuple[PreTrainedModel, PreTrainedModel, Critic]
SEEDS = st.lists(st.integers(0, 10**6), min_size=2, max_size=5, unique=True)
TOKENS = st.sampled_from([1, 60, 10_000])


@pytest.fixture(scope="module")
def parts(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """The tests leave them as they are."""
    return student_teacher_critic(tokenizer)


@contextmanager
def poisoned(episodes: list[Episode], parts: Parts) -> Iterator[None]:
    """Every hidden state that does not predict a token of the model is nan."""
    predicts = {
        tuple(episode.token_ids): [owner == Owner.MODEL for owner in episode.owners[1:]]
        for episode in episodes
    }

    def poison(module: torch.nn.Module, args: object, kwargs: dict[str, Any], output: Any) -> Any:
        ids = kwargs["input_ids"]
        keep = torch.zeros(ids.shape, dtype=torch.bool)
        for row, sequence in enumerate(ids.tolist()):
            (flags,) = (f for known, f in predicts.items() if tuple(sequence[: len(known)]) == known)
            keep[row, : len(flags)] = torch.tensor(flags)
        output.last_hidden_state = output.last_hidden_state.where(keep[..., None], torch.nan)
        return output

    student, teacher, critic = parts
    with ExitStack() as stack:
        for module in (student.base_model, teacher.base_model, critic.backbone):
            handle = module.register_forward_hook(poison, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def close(first: object, second: object) -> None:
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


Algorithm = Literal["ppo", "grpo"]


def pairs_of_episodes(seeds: list[int]) -> list[Episode]:
    """Two a question, one of them correct: GRPO compares within a question."""
    return [
        replace(random_episode(seed, correct=place % 2 == 0), question_id=f"q{place // 2}")
        for place, seed in enumerate(seeds)
    ]


def experience_of(
    parts: Parts, episodes: list[Episode], tokens: int, algorithm: Algorithm, estimator: str = "k1"
) -> Experience:
    recipe = reinforcement(algorithm, "uniform", divergence=estimator)
    config = ReinforceConfig(beta=0.1)
    actor, reference, critic = engines(parts, exact(tokens))
    valued = critic if algorithm == "ppo" else None
    return ExperienceMaker(actor, reference, valued, recipe, config, exact(tokens)).make(episodes)


@pytest.mark.parametrize(
    ("algorithm", "own"),
    [("ppo", ("values", "returns", "rewards")), ("grpo", ())],
)
@settings(max_examples=12)
@given(SEEDS, st.sampled_from(["k1", "k2", "k3", "abs", "reverse_kl"]), TOKENS)
def test_experience(
    parts: Parts, algorithm: Algorithm, own: tuple[str, ...], seeds: list[int], estimator: str, tokens: int
) -> None:
    episodes = pairs_of_episodes(seeds)
    clean = experience_of(parts, episodes, 10_000, algorithm, estimator)
    with poisoned(episodes, parts):
        found = experience_of(parts, episodes, tokens, algorithm, estimator)
    assert any(advantages.any() for advantages in found.advantages)
    close(found.rewards, clean.rewards)
    close(found.kl, clean.kl)
    for name in ("old_logprobs", "advantages", *own):
        close(getattr(found, name), getattr(clean, name))
        assert [len(x) for x in getattr(found, name)] == [e.model_tokens for e in episodes]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("divergence", [None, "reverse_kl", "k3"])
@settings(max_examples=6)
@given(SEEDS, TOKENS)
def test_updates(
    parts: Parts, algorithm: Algorithm, divergence: str | None, seeds: list[int], tokens: int
) -> None:
    """With the KL in the loss, and without."""
    episodes = pairs_of_episodes(seeds)
    student, _, critic = parts
    experience = experience_of(parts, episodes, 10_000, algorithm)
    config, everyone = ReinforceConfig(beta=0.1, entropy_weight=0.05), list(range(len(episodes)))

    def results(budget: int) -> list[object]:
        trained, reference, engine = engines(parts, exact(budget))
        valued = engine if algorithm == "ppo" else None
        guidance = None if divergence is None else GuidanceLoss(reference, divergence, 0.5)
        updater = Updater(trained, valued, config, exact(budget), guidance)
        metrics = list(updater._actor_gradient(experience, everyone).values())
        actor = gradients(student)
        if valued is None or not isinstance(experience, PPOExperience):
            return [metrics, actor]
        return [metrics, actor, updater._critic_gradient(valued, experience, everyone), gradients(critic)]

    clean = results(10_000)
    with poisoned(episodes, parts):
        close(results(tokens), clean)


def losses_and_gradients(
    parts: Parts, episodes: list[Episode], objective: str, tokens: int, cache: TeacherCache | None = None
) -> list[object]:
    """Losses and gradients of one batch, from the teacher itself or from its kept distributions."""
    student, teacher, _ = parts
    config, live = DistillConfig(), None if cache else teacher
    source = TeacherEpisodes(episodes, config, seed=0)
    recipe = distillation(objective)
    distiller = Distiller(student, live, recipe, config, exact(tokens), source, cache)
    row = distiller._averages([distiller._sequence(episode) for episode in episodes])
    return [list(row.values()), gradients(student)]


@pytest.mark.parametrize("objective", ["kd", "ce", "taid", "skew_kl", "reverse_kl"])
@settings(max_examples=8)
@given(SEEDS, TOKENS)
def test_distillation(parts: Parts, objective: str, seeds: list[int], tokens: int) -> None:
    episodes = [random_episode(seed) for seed in seeds]
    clean = losses_and_gradients(parts, episodes, objective, 10_000)
    with poisoned(episodes, parts):
        close(losses_and_gradients(parts, episodes, objective, tokens), clean)
    assert all(parameter.grad is None for parameter in parts[1].parameters())


@pytest.mark.parametrize("objective", ["kd", "taid", "skew_kl", "reverse_kl"])
@settings(max_examples=8)
@given(SEEDS, TOKENS)
def test_distillation_from_kept_distributions(
    parts: Parts, tokenizer: PreTrainedTokenizerFast, objective: str, seeds: list[int], tokens: int
) -> None:
    """They are made from the poisoned teacher, too."""
    episodes = [random_episode(seed) for seed in seeds]

    def results(budget: int) -> list[object]:
        student, teacher, _ = parts
        config = DistributionsConfig(top_k=5, sample=2)
        with TemporaryDirectory() as folder:
            build_cache(
                Path(folder), episodes, teacher, student, tokenizer, config, exact(budget), lambda *_: None
            )
            cache = TeacherCache(Path(folder), tokenizer)
            return losses_and_gradients(parts, episodes, objective, budget, cache)

    clean = results(10_000)
    with poisoned(episodes, parts):
        close(results(tokens), clean)
