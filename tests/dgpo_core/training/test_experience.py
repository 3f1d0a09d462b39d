"""What PPO trains on, against single episodes computed one by one (float32)."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.config.agent import Sampling
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.training.reinforce import Critic, Experience, ExperienceMaker, training_metrics
from tests.dgpo_core.making import engines, random_episode, student_teacher_critic

EPISODES = [random_episode(seed, correct=seed % 3 == 0) for seed in range(7)]
Parts = tuple[PreTrainedModel, PreTrainedModel, Critic]


@pytest.fixture
def parts(tokenizer: PreTrainedTokenizerFast) -> Parts:
    return student_teacher_critic(tokenizer)


def make(
    parts: Parts,
    guidance: str = "selective",
    tokens: int = 10_000,
    config: ReinforceConfig | None = None,
    algorithm: str = "ppo",
    episodes: list[Episode] | None = None,
) -> Experience:
    reference = "none" if guidance == "none" else "teacher"
    recipe = Reinforcement.model_validate(
        {"start": "student", "algorithm": algorithm, "guidance": guidance, "reference": reference}
    )
    compute = ComputeConfig(device="cpu", precision="float32", micro_batch_tokens=tokens)
    actor, teacher, critic = engines(parts, compute)
    maker = ExperienceMaker(
        actor,
        None if guidance == "none" else teacher,
        critic if algorithm == "ppo" else None,
        recipe,
        config or ReinforceConfig(beta=0.1),
        compute,
    )
    return maker.make(episodes or EPISODES)


def own_logprobs(model: PreTrainedModel, episode: Episode, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        table = (model(torch.tensor([episode.token_ids])).logits[0] / temperature).log_softmax(-1)
    places = [t for t, owner in enumerate(episode.owners) if owner == Owner.MODEL]
    return torch.stack([table[t - 1, episode.token_ids[t]] for t in places])


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rewards_are_eq_4(parts: Parts, temperature: float) -> None:
    student, teacher, _ = parts
    experience = make(parts, config=ReinforceConfig(beta=0.1, sampling=Sampling(temperature=temperature)))
    for i, episode in enumerate(EPISODES):
        old = own_logprobs(student, episode, temperature)
        close(experience.old_logprobs[i], old)
        if episode.correct:
            assert experience.rewards[i].tolist() == [0.0] * (len(old) - 1) + [1.0]
            assert not experience.kl[i].any()
        else:
            close(experience.rewards[i], -0.1 * (old - own_logprobs(teacher, episode, temperature)))
    assert experience.gated == [not episode.correct for episode in EPISODES]


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
    experience = make(parts, guidance, config=ReinforceConfig(audit_episodes=0))
    assert sum(seen) == sum(experience.gated) == runs
    for kl, gated in zip(experience.kl, experience.gated, strict=True):
        assert bool(kl.any()) == gated


def test_standard_ppo_takes_kl_from_correct_episodes_too(parts: Parts) -> None:
    student, teacher, _ = parts
    experience = make(parts, "uniform")
    for rewards, episode in zip(experience.rewards, EPISODES, strict=True):
        expected = -0.1 * (own_logprobs(student, episode) - own_logprobs(teacher, episode))
        expected[-1] += float(episode.correct)
        close(rewards, expected)


def test_full_kl(parts: Parts) -> None:
    student, teacher, _ = parts
    experience = make(parts, config=ReinforceConfig(kl_estimator="full"))
    for i, episode in enumerate(EPISODES):
        if not episode.correct:
            with torch.no_grad():
                ids = torch.tensor([episode.token_ids])
                first, second = (m(ids).logits[0].log_softmax(-1) for m in (student, teacher))
            places = [t - 1 for t, owner in enumerate(episode.owners) if owner == Owner.MODEL]
            close(experience.kl[i], (first.exp() * (first - second)).sum(-1)[places])
            assert (experience.kl[i] >= 0).all()


@pytest.mark.parametrize("scope", ["model_tokens", "all"])
@pytest.mark.parametrize("tokens", [1, 50])
def test_micro_batches_change_nothing(parts: Parts, scope: str, tokens: int) -> None:
    config = ReinforceConfig.model_validate({"gae_scope": scope})
    first, second = make(parts, config=config), make(parts, tokens=tokens, config=config)
    for name in ("old_logprobs", "advantages", "values", "returns", "kl", "rewards"):
        close(torch.cat(getattr(first, name)), torch.cat(getattr(second, name)))


def test_release_runs_gae_over_the_environments_tokens_too(parts: Parts) -> None:
    own, whole = make(parts), make(parts, config=ReinforceConfig(beta=0.1, gae_scope="all"))
    flat = []
    for i, episode in enumerate(EPISODES):
        response = [owner for owner in episode.owners if owner != Owner.PROMPT]
        assert len(whole.values[i]) == len(whole.returns[i]) == len(whole.rewards[i]) == len(response)
        assert len(whole.advantages[i]) == len(whole.old_logprobs[i]) == episode.model_tokens
        mine = torch.tensor([owner == Owner.MODEL for owner in response])
        close(whole.rewards[i][mine], own.rewards[i])
        assert not whole.rewards[i][~mine].any(), "the environment's tokens are rewarded"
        close(whole.values[i][mine], own.values[i])
        flat.append(whole.rewards[i].flip(0).cumsum(0).flip(0) - whole.values[i])
    every = torch.cat(flat)
    owned = torch.cat(
        [torch.tensor([o == Owner.MODEL for o in e.owners if o != Owner.PROMPT]) for e in EPISODES]
    )
    close(torch.cat(whole.advantages), ((every - every.mean()) / every.std())[owned])


def test_training_metrics(parts: Parts) -> None:
    experience = make(parts)
    metrics = training_metrics(EPISODES, experience)
    assert metrics["em"] == pytest.approx(3 / 7)
    assert metrics["reward"] == pytest.approx(sum(float(r.sum()) for r in experience.rewards) / 7)
    gated = torch.cat([k for k, g in zip(experience.kl, experience.gated, strict=True) if g])
    assert metrics["kl_inside"] == pytest.approx(float(gated.mean()))
    assert metrics["response_tokens"] == pytest.approx(sum(e.model_tokens for e in EPISODES) / 7)
    returns, values = torch.cat(experience.returns), torch.cat(experience.values)
    expected = 1 - float((returns - values).var() / returns.var())
    assert metrics["explained_variance"] == pytest.approx(expected, abs=1e-5)


def test_audit_measures_some_closed_episodes_and_changes_nothing(parts: Parts) -> None:
    student, teacher, _ = parts
    audited, plain = (make(parts, config=ReinforceConfig(beta=0.1, audit_episodes=n)) for n in (2, 0))
    correct = [episode for episode in EPISODES if episode.correct][:2]
    for kl, episode in zip(audited.kl_outside, correct, strict=True):
        close(kl, own_logprobs(student, episode) - own_logprobs(teacher, episode))
    assert plain.kl_outside == [] and "kl_outside" not in training_metrics(EPISODES, plain)
    measured = training_metrics(EPISODES, audited)["kl_outside"]
    assert measured == pytest.approx(float(torch.cat(audited.kl_outside).mean()))
    for name in ("advantages", "returns", "kl", "rewards"):
        close(torch.cat(getattr(audited, name)), torch.cat(getattr(plain, name)))


def test_grpo_compares_episodes_of_one_question(parts: Parts) -> None:
    student, teacher, _ = parts
    names = ["a", "a", "b", "a", "b", "b", "c"]
    episodes = [replace(e, question_id=name) for e, name in zip(EPISODES, names, strict=True)]
    experience = make(parts, algorithm="grpo", episodes=episodes)
    rewards = torch.tensor([float(e.correct) for e in episodes])
    for i, episode in enumerate(episodes):
        group = rewards[[name == names[i] for name in names]]
        expected = 0.0 if len(group) == 1 else (rewards[i] - group.mean()) / (group.std() + 1e-6)
        close(experience.advantages[i], torch.full((episode.model_tokens,), float(expected)))
        reference = experience.reference[i]
        if episode.correct:
            assert reference is None and not experience.kl[i].any()
        else:
            assert reference is not None
            close(reference, own_logprobs(teacher, episode))
            gap = own_logprobs(teacher, episode) - own_logprobs(student, episode)
            close(experience.kl[i], gap.exp() - gap - 1)
    assert experience.values == [] and "explained_variance" not in training_metrics(episodes, experience)


def test_same_question_of_two_data_sets_is_two_groups(parts: Parts) -> None:
    two = [replace(EPISODES[i], question_id="q", dataset=name) for i, name in ((0, "x"), (1, "x"), (2, "y"))]
    assert not make(parts, algorithm="grpo", episodes=two).advantages[2].any()


def test_grpo_without_guidance_needs_no_reference(parts: Parts) -> None:
    experience = make(parts, "none", algorithm="grpo")
    assert experience.reference == [None] * len(EPISODES) and experience.kl_outside == []
    assert not any(kl.any() for kl in experience.kl) and not any(experience.gated)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_gap_between_trainer_and_engine(parts: Parts, algorithm: str) -> None:
    experience = make(parts, algorithm=algorithm)
    own = torch.cat([own_logprobs(parts[0], episode) for episode in EPISODES])
    engine = torch.tensor(
        [p for e in EPISODES for p, o in zip(e.logprobs, e.owners, strict=True) if o == Owner.MODEL]
    )
    assert experience.sampled_logprobs is not None
    close(torch.cat(experience.sampled_logprobs), engine)
    metrics = training_metrics(EPISODES, experience)
    assert metrics["engine_gap_mean"] == pytest.approx(float((own - engine).abs().mean()), rel=1e-4)
    assert metrics["engine_gap_max"] == pytest.approx(float((own - engine).abs().max()), rel=1e-4)
    assert metrics["engine_ratio"] == pytest.approx(float((own - engine).exp().mean()), rel=1e-4)
    config = ReinforceConfig(beta=0.1, old_logprobs="rollout")
    alike = make(parts, algorithm=algorithm, config=config)
    assert alike.sampled_logprobs is None
    assert not any(key.startswith("engine") for key in training_metrics(EPISODES, alike))
