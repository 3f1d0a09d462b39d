"""From episodes to advantages, against single episodes computed alone (float32)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.episode import Decode, Episode, Owner, Search
from dgpo_core.config.agent import Sampling
from dgpo_core.config.training import ReinforceConfig
from dgpo_core.training.batches import model_sequence
from dgpo_core.training.experience import ExperienceMaker, PPOExperience, training_metrics
from dgpo_core.training.reinforce import Critic
from tests.dgpo_core.making import (
    engines,
    exact,
    logprobs_of,
    random_episode,
    reinforcement,
    student_teacher_critic,
    table,
)

EPISODES = [random_episode(seed, correct=seed % 3 == 0) for seed in range(7)]
REWARD: dict[str, Any] = {"placement": "reward"}
LOSS: dict[str, Any] = {"placement": "loss", "divergence": "reverse_kl", "weight": 0.3}
Parts = tuple[PreTrainedModel, PreTrainedModel, Critic]


def close(first: Any, second: Any, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    torch.testing.assert_close(first, second, rtol=rtol, atol=atol)


@pytest.fixture
def parts(tokenizer: PreTrainedTokenizerFast) -> Parts:
    return student_teacher_critic(tokenizer)


def make(
    parts: Parts,
    algorithm: str = "ppo",
    guidance: str = "selective",
    episodes: list[Episode] = EPISODES,
    row: dict[str, Any] = REWARD,
    decode: Decode | None = None,
    **settings: Any,
) -> Any:
    config = ReinforceConfig.model_validate({"beta": 0.1} | settings)
    actor, teacher, critic = engines(parts, exact())
    reference = None if guidance == "none" else teacher
    valued = critic if algorithm == "ppo" else None
    recipe = reinforcement(algorithm, guidance, **row)
    maker = ExperienceMaker(actor, reference, valued, recipe, config, exact(), decode=decode)
    return maker.make(episodes)


@torch.no_grad()
@pytest.mark.parametrize(
    ("guidance", "temperature"), [("selective", 1.0), ("selective", 0.7), ("uniform", 1.0)]
)
def test_rewards_are_eq_4(parts: Parts, guidance: str, temperature: float) -> None:
    """Standard PPO (uniform) takes the KL from correct episodes too."""
    student, teacher, _ = parts
    experience = make(parts, guidance=guidance, sampling=Sampling(temperature=temperature))
    pulled = [guidance == "uniform" or not episode.correct for episode in EPISODES]
    assert experience.gate.tolist() == pulled
    for i, episode in enumerate(EPISODES):
        old = logprobs_of(student, episode, temperature)
        kl = (old - logprobs_of(teacher, episode, temperature)) * pulled[i]
        expected = -0.1 * kl
        expected[-1] += float(episode.correct)
        close(experience.old_logprobs[i], old)
        assert (i in experience.kl) == pulled[i]
        if pulled[i]:
            close(experience.kl[i], kl)
        close(experience.rewards[i], expected)


def test_advantages_are_whitened_reward_to_go_minus_value(parts: Parts) -> None:
    experience = make(parts)
    raw = [
        rewards.flip(0).cumsum(0).flip(0) - values
        for rewards, values in zip(experience.rewards, experience.values, strict=True)
    ]
    flat = torch.cat(raw)
    close(torch.cat(experience.advantages), (flat - flat.mean()) / flat.std())
    close(torch.cat(experience.returns), flat + torch.cat(experience.values))
    assert [len(a) for a in experience.advantages] == [episode.model_tokens for episode in EPISODES]


@pytest.mark.parametrize(("guidance", "runs"), [("selective", 4), ("uniform", 7), ("none", 0)])
def test_reference_runs_only_on_gated_episodes(parts: Parts, guidance: str, runs: int) -> None:
    seen: list[int] = []
    parts[1].base_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    experience = make(parts, guidance=guidance, audit_episodes=0)
    assert sum(seen) == experience.gate.sum() == runs
    assert list(experience.kl) == experience.gate.nonzero()[:, 0].tolist()


@torch.no_grad()
def test_kl_over_the_whole_vocabulary(parts: Parts) -> None:
    student, teacher, _ = parts
    experience = make(parts, row={"divergence": "reverse_kl"})
    for i, kl in experience.kl.items():
        first, second = (table(model, EPISODES[i].token_ids) for model in (student, teacher))
        places = [position - 1 for position in model_sequence(EPISODES[i]).positions]
        close(kl, (first.exp() * (first - second)).sum(-1)[places])
        assert (kl >= 0).all()


def test_a_kl_of_the_loss_is_no_reward(parts: Parts) -> None:
    experience = make(parts, row=LOSS)
    assert experience.gate.sum() == 4 and experience.kl == {}
    assert [float(rewards.sum()) for rewards in experience.rewards] == [float(e.correct) for e in EPISODES]
    assert list(experience.kl_outside) == [i for i, e in enumerate(EPISODES) if e.correct]


def test_release_runs_gae_over_the_environments_tokens_too(parts: Parts) -> None:
    own, whole = make(parts), make(parts, gae_scope="all")
    raw, written = [], []
    for i, episode in enumerate(EPISODES):
        mine = torch.tensor([owner == Owner.MODEL for owner in episode.owners if owner != Owner.PROMPT])
        assert len(whole.values[i]) == len(whole.returns[i]) == len(whole.rewards[i]) == len(mine)
        assert len(whole.advantages[i]) == len(whole.old_logprobs[i]) == episode.model_tokens
        close(whole.rewards[i][mine], own.rewards[i])
        assert not whole.rewards[i][~mine].any(), "the environment's tokens are rewarded"
        close(whole.values[i][mine], own.values[i])
        raw.append(whole.rewards[i].flip(0).cumsum(0).flip(0) - whole.values[i])
        written.append(mine)
    flat = torch.cat(raw)
    close(torch.cat(whole.advantages), ((flat - flat.mean()) / flat.std())[torch.cat(written)])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_has_the_rewards_to_come_minus_the_mean_of_the_step(parts: Parts, gamma: float) -> None:
    experience = make(parts, "reinforce", gamma=gamma)
    assert not isinstance(experience, PPOExperience)
    to_come = [
        sum(gamma**k * float(r) for k, r in enumerate(rewards[place:]))
        for rewards in experience.rewards
        for place in range(len(rewards))
    ]
    flat = torch.tensor(to_come)
    close(torch.cat(experience.advantages), (flat - flat.mean()) / flat.std())
    close(experience.rewards, make(parts, gamma=gamma).rewards)  # with the KL as PPO has it


SCRIPT = ["<search>q</search>", "well", "<search>q</search>", "<search>r</search>", "<search>q</search>"]


def searching() -> Episode:
    """Five turns of two tokens: searches 1 and 3 find the same, turn 2 is invalid, the last is unanswered."""
    owners = [int(owner) for owner in (Owner.PROMPT, *[Owner.MODEL, Owner.MODEL, Owner.ENVIRONMENT] * 5)]
    searches = [Search("q", passages, [1.0]) for passages in (["a"], ["a"], ["b"])]
    base = random_episode(0, correct=True)
    ids, owners = list(range(1, len(owners))), owners[:-1]
    return replace(base, token_ids=ids, owners=owners, logprobs=[-1.0] * len(ids), searches=searches)


@pytest.mark.parametrize(
    ("algorithm", "scope"), [("ppo", "model_tokens"), ("ppo", "all"), ("reinforce", "all")]
)
def test_a_search_that_brings_nothing_new_is_punished_where_it_ends(
    parts: Parts, algorithm: str, scope: str
) -> None:
    """In the third of five turns: on its second token, whichever tokens have a reward."""
    episode = searching()
    how: dict[str, Any] = {"guidance": "none", "gae_scope": scope, "repeat_penalty": 0.25}
    starts = {turn.start: number for number, turn in enumerate(episode.turns)}
    plain, found = (
        make(
            parts, algorithm, episodes=[episode, random_episode(3)],
            decode=lambda ids: SCRIPT[starts[ids[0] - 1]] if ids[0] - 1 in starts else "", **how | own,
        )
        for own in ({"repeat_penalty": 0.0}, {})
    )  # fmt: skip
    taken = plain.rewards[0] - found.rewards[0]
    place = 7 if (algorithm, scope) == ("ppo", "all") else 5
    assert taken.nonzero()[:, 0].tolist() == [place] and float(taken[place]) == 0.25
    close(found.rewards[1], plain.rewards[1])


def test_training_metrics(parts: Parts) -> None:
    experience = make(parts)
    metrics = training_metrics(EPISODES, experience)
    assert metrics["em"] == pytest.approx(3 / 7)
    assert metrics["reward"] == pytest.approx(sum(float(r.sum()) for r in experience.rewards) / 7)
    inside = torch.cat(list(experience.kl.values()))
    assert len(experience.kl) == 4 and metrics["kl_inside"] == pytest.approx(float(inside.mean()))
    assert metrics["response_tokens"] == pytest.approx(sum(e.model_tokens for e in EPISODES) / 7)
    returns, values = torch.cat(experience.returns), torch.cat(experience.values)
    expected = 1 - float((returns - values).var() / returns.var())
    assert metrics["explained_variance"] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_audit_measures_some_closed_episodes_and_changes_nothing(parts: Parts) -> None:
    student, teacher, _ = parts
    audited, plain = (make(parts, audit_episodes=n) for n in (2, 0))
    correct = [episode for episode in EPISODES if episode.correct][:2]
    for kl, episode in zip(audited.kl_outside.values(), correct, strict=True):
        close(kl, logprobs_of(student, episode) - logprobs_of(teacher, episode))
    assert plain.kl_outside == {} and "kl_outside" not in training_metrics(EPISODES, plain)
    outside = training_metrics(EPISODES, audited)["kl_outside"]
    assert outside == pytest.approx(float(torch.cat(list(audited.kl_outside.values())).mean()))
    for name in ("advantages", "returns", "rewards"):
        close(torch.cat(getattr(audited, name)), torch.cat(getattr(plain, name)))


@torch.no_grad()
def test_grpo_compares_episodes_of_one_question(parts: Parts) -> None:
    """By EM, and by the sum of the KL of those whose gate is open (eq. 4)."""
    student, teacher, _ = parts
    names = ["a", "a", "b", "a", "b", "b", "c"]
    episodes = [replace(e, question_id=name) for e, name in zip(EPISODES, names, strict=True)]
    experience = make(parts, "grpo", episodes=episodes)
    sums = [float((logprobs_of(student, e) - logprobs_of(teacher, e)).sum()) for e in episodes]
    rewards = torch.tensor([1.0 if e.correct else -0.1 * kl for e, kl in zip(episodes, sums, strict=True)])
    for i, episode in enumerate(episodes):
        group = rewards[[name == names[i] for name in names]]
        expected = 0.0 if len(group) == 1 else (rewards[i] - group.mean()) / (group.std() + 1e-6)
        close(experience.advantages[i], torch.full((episode.model_tokens,), float(expected)))
    assert not isinstance(experience, PPOExperience)
    assert "explained_variance" not in training_metrics(episodes, experience)
    two = [replace(EPISODES[i], question_id="q", dataset=name) for i, name in ((0, "x"), (1, "x"), (2, "y"))]
    assert not make(parts, "grpo", episodes=two).advantages[2].any(), "two data sets' questions are compared"


def test_grpo_without_guidance_needs_no_reference(parts: Parts) -> None:
    experience = make(parts, "grpo", "none")
    assert experience.kl == experience.kl_outside == {} and not experience.gate.any()
    assert [float(reward) for reward in experience.rewards] == [float(e.correct) for e in EPISODES]


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_gap_between_trainer_and_engine(parts: Parts, algorithm: str) -> None:
    experience = make(parts, algorithm)
    own = torch.cat([logprobs_of(parts[0], episode) for episode in EPISODES])
    engine = torch.tensor(
        [p for e in EPISODES for p, o in zip(e.logprobs, e.owners, strict=True) if o == Owner.MODEL]
    )
    close(torch.cat(experience.sampled_logprobs), engine)
    gap = {"mean": (own - engine).abs().mean(), "max": (own - engine).abs().max()}
    metrics = training_metrics(EPISODES, experience)
    assert metrics["engine_gap_mean"] == pytest.approx(float(gap["mean"]), rel=1e-4)
    assert metrics["engine_gap_max"] == pytest.approx(float(gap["max"]), rel=1e-4)
    assert metrics["engine_ratio"] == pytest.approx(float((own - engine).exp().mean()), rel=1e-4)
    alike = make(parts, algorithm, old_logprobs="rollout")
    assert alike.sampled_logprobs is None
    assert not any(key.startswith("engine") for key in training_metrics(EPISODES, alike))
