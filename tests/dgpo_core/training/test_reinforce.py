"""The steps of reinforcement learning, against single episodes computed alone (float32)."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.episode import Decode, Episode, Owner, Search
from dgpo_core.config.agent import Sampling
from dgpo_core.config.training import ReinforceConfig
from dgpo_core.training.batches import Critic, TokenSequence, collate, model_sequence, response_sequence
from dgpo_core.training.engines import FrozenModel
from dgpo_core.training.episode_sources import mini_batches
from dgpo_core.training.guidance import GuidanceLoss
from dgpo_core.training.reinforce import ExperienceMaker, PPOExperience, Updater, training_metrics
from tests.dgpo_core.making import (
    engines,
    exact,
    gradients,
    logprobs_of,
    random_episode,
    reinforcement,
    student_teacher_critic,
    table,
    tiny_model,
    weights_of,
)

EPISODES = [random_episode(seed, correct=seed % 3 == 0) for seed in range(7)]
CHOSEN = [4, 0, 3, 5]  # a mini-batch
REWARD: dict[str, Any] = {"placement": "reward"}
LOSS: dict[str, Any] = {"placement": "loss", "divergence": "reverse_kl", "weight": 0.3}
Parts = tuple[PreTrainedModel, PreTrainedModel, Critic]


def close(first: Any, second: Any, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    torch.testing.assert_close(first, second, rtol=rtol, atol=atol)


@pytest.fixture
def parts(tokenizer: PreTrainedTokenizerFast) -> Parts:
    return student_teacher_critic(tokenizer)


# Steps (2) to (6): experience


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


# Step (7): update


def updater_of(parts: Parts, tokens: int = 10_000, **settings: Any) -> Updater:
    values = {"batch_size": 4, "mini_batch_size": 4, "entropy_weight": 0.05} | settings
    actor, _, critic = engines(parts, exact(tokens))
    return Updater(actor, critic, ReinforceConfig.model_validate(values), exact(tokens))


def experience_of(scope: str = "model_tokens") -> PPOExperience:
    """Random old log-probabilities near the policy's, advantages, values and returns."""
    generator = torch.Generator().manual_seed(1)
    sequences = [model_sequence(e) for e in EPISODES]
    valued = sequences if scope == "model_tokens" else [response_sequence(e) for e in EPISODES]

    def draw(of: list[TokenSequence], shift: float = 0.0) -> list[torch.Tensor]:
        return [torch.randn(len(s.positions), generator=generator) * 0.5 + shift for s in of]

    return PPOExperience(
        sequences=sequences,
        old_logprobs=draw(sequences, -6.5),
        sampled_logprobs=None,
        correct=torch.tensor([episode.correct for episode in EPISODES]),
        gate=torch.ones(len(EPISODES)),
        kl={},
        kl_outside={},
        rewards=draw(valued),
        advantages=draw(sequences),
        value_sequences=valued,
        values=draw(valued),
        returns=draw(valued),
    )


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_actor_gradient_is_eq_2(parts: Parts, tokens: int, cap: float | None) -> None:
    """With a cap each token weighs w = min(exp(old - sampled), cap); the entropy is as it was."""
    student, experience = parts[0], experience_of()
    updater = updater_of(parts, tokens, importance_cap=cap)
    sampled = [old + 0.8 * torch.linspace(-1, 1, len(old)) for old in experience.old_logprobs]
    metrics = updater._actor_gradient(replace(experience, sampled_logprobs=sampled), CHOSEN)
    found = gradients(student)
    objectives, entropies, active = [], [], 0
    for i in CHOSEN:
        sequence, old = experience.sequences[i], experience.old_logprobs[i]
        own = table(student, sequence.ids)
        for place, position in enumerate(sequence.positions):
            ratio = (own[position - 1, sequence.ids[position]] - old[place]).exp()
            advantage = float(experience.advantages[i][place])
            bounded = min(max(float(ratio), 0.8), 1.2)
            clips = bounded * advantage < float(ratio) * advantage
            weight = min(math.exp(float(old[place] - sampled[i][place])), cap) if cap else 1.0
            active += clips
            objectives.append(weight * (torch.tensor(bounded * advantage) if clips else ratio * advantage))
            entropies.append(-(own[position - 1].exp() * own[position - 1]).sum())
    objective, entropy = torch.stack(objectives).mean(), torch.stack(entropies).mean()
    (-objective - 0.05 * entropy).backward()
    close(found, gradients(student), 1e-3, 1e-6)
    assert metrics["policy_loss"] == pytest.approx(-float(objective), rel=1e-3)
    assert metrics["entropy"] == pytest.approx(float(entropy), rel=1e-4)
    assert metrics["clip_fraction"] == pytest.approx(active / len(objectives))
    assert 0 < active < len(objectives)


@pytest.mark.parametrize("scope", ["model_tokens", "all"])
@pytest.mark.parametrize("tokens", [1, 10_000])
def test_critic_gradient(parts: Parts, tokens: int, scope: str) -> None:
    critic, experience, updater = parts[2], experience_of(scope), updater_of(parts, tokens)
    assert updater.critic is not None
    reported = updater._critic_gradient(updater.critic, experience, CHOSEN)
    found = gradients(critic)
    losses = []
    for i in CHOSEN:
        sequence = experience.value_sequences[i]
        states = critic.backbone(input_ids=torch.tensor([sequence.ids])).last_hidden_state[0]
        values = critic.head(states)[[position - 1 for position in sequence.positions], 0]
        old, target = experience.values[i], experience.returns[i]
        clipped = old + (values - old).clamp(-0.5, 0.5)
        losses.append(torch.maximum((values - target) ** 2, (clipped - target) ** 2))
    loss = 0.5 * torch.cat(losses).mean()
    loss.backward()
    assert reported == pytest.approx(float(loss), rel=1e-4)
    close(found, gradients(critic), 1e-3, 1e-6)


def test_update_steps_once_a_mini_batch(parts: Parts) -> None:
    student, _, critic = parts
    updater, before = updater_of(parts), weights_of(student)
    metrics = updater.update(experience_of(), [5, 4, 3, 2, 1, 0])
    for engine in (updater.actor, updater.critic):
        assert engine is not None
        ((_, schedule),) = engine.state_dict()["stepper"]["parts"]
        assert schedule["last_epoch"] == 2
    names = "policy_loss entropy clip_fraction approx_kl actor_grad_norm value_loss critic_grad_norm"
    assert set(metrics) == set(names.split())
    assert any(not torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert all(p.grad is None for p in [*student.parameters(), *critic.parameters()])


def guided(
    parts: Parts, divergence: str, weight: float, temperature: float = 1.0, tokens: int = 10_000
) -> Updater:
    """An updater with the KL in its loss."""
    updater = updater_of(parts, tokens, entropy_weight=0.0, sampling=Sampling(temperature=temperature))
    row: dict[str, Any] = {"placement": "loss", "divergence": divergence, "weight": weight}
    updater.guidance = GuidanceLoss.of(reinforcement(**row), FrozenModel(parts[1], exact()))
    return updater


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("tokens", [1, 10_000])
def test_kl_of_gated_episodes_is_a_term_of_the_loss(parts: Parts, divergence: str, tokens: int) -> None:
    """The mean over all tokens of the mini-batch; over the vocabulary at temperature 1, else as sampled."""
    (student, teacher, _), temperature = parts, 0.7
    experience = replace(experience_of(), gate=torch.tensor([1.0, 0, 0, 1, 0, 0, 1]))
    updater_of(parts, entropy_weight=0.0, sampling=Sampling(temperature=temperature))._actor_gradient(
        experience, CHOSEN
    )
    plain = gradients(student)
    metrics = guided(parts, divergence, 0.3, temperature, tokens)._actor_gradient(experience, CHOSEN)
    found = [a - b for a, b in zip(gradients(student), plain, strict=True)]
    terms, gaps, count = [], [], 0
    for i in CHOSEN:
        sequence = experience.sequences[i]
        count += len(sequence.positions)
        if not experience.gate[i]:
            continue
        places = [position - 1 for position in sequence.positions]
        own = logprobs_of(student, sequence, temperature)
        with torch.no_grad():
            theirs = logprobs_of(teacher, sequence, temperature)
            wide = table(teacher, sequence.ids)[places]
        mine, gap = table(student, sequence.ids)[places], own - theirs
        gaps.append(experience.old_logprobs[i] - theirs)
        terms.append(
            {
                "reverse_kl": (mine.exp() * (mine - wide)).sum(-1),
                "forward_kl": (wide.exp() * (wide - mine)).sum(-1),
                "k1": gap,
                "k2": gap.square() / 2,
                "k3": (-gap).exp() + gap - 1,
                "abs": gap.abs(),
            }[divergence]
        )
    mean = torch.cat(terms).sum() / count
    (0.3 * mean).backward()
    close(found, gradients(student), 1e-3, 1e-5)
    assert metrics["guidance_loss"] == pytest.approx(float(mean), rel=1e-3)
    assert metrics["kl_inside"] == pytest.approx(float(torch.cat(gaps).mean()), rel=1e-3)


def turn_lengths(sequence: TokenSequence) -> list[int]:
    """Of the runs of positions."""
    begins = [i for i, p in enumerate(sequence.positions) if i == 0 or p != sequence.positions[i - 1] + 1]
    return [b - a for a, b in pairwise([*begins, len(sequence.positions)])]


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_sod_weighs_the_kl_of_each_turn(parts: Parts, tokens: int) -> None:
    (student, teacher, _), experience = parts, experience_of()
    updater = guided(parts, "reverse_kl", 0.3, tokens=tokens)
    updater.guidance = replace(updater.guidance, turns="sod")  # type: ignore[type-var]
    updater._actor_gradient(
        replace(experience, advantages=[torch.zeros_like(a) for a in experience.advantages]), CHOSEN
    )
    found, terms = gradients(student), []
    for i in CHOSEN:
        sequence, old = experience.sequences[i], experience.old_logprobs[i]
        places = [position - 1 for position in sequence.positions]
        with torch.no_grad():
            wide, gaps = table(teacher, sequence.ids)[places], old - logprobs_of(teacher, sequence)
        mine = table(student, sequence.ids)[places]
        means = [float(part.abs().mean()) for part in gaps.split(turn_lengths(sequence))]
        kl = (mine.exp() * (mine - wide)).sum(-1)
        for part, mean in zip(kl.split(turn_lengths(sequence)), means, strict=True):
            terms.append(min(means[0] / mean, 1.2) * part)
    (0.3 * torch.cat(terms).mean()).backward()
    close(found, gradients(student), 1e-3, 1e-5)


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_falling_likelihood_is_a_term_of_the_loss(parts: Parts, tokens: int) -> None:
    """Of the tokens with a good advantage, in turns where their likelihood has fallen."""
    student, experience = parts[0], experience_of()
    updater_of(parts, entropy_weight=0.0)._actor_gradient(experience, CHOSEN)
    plain = gradients(student)
    updater = updater_of(parts, tokens, entropy_weight=0.0, preserve_weight=0.5)
    metrics = updater._actor_gradient(experience, CHOSEN)
    found = [a - b for a, b in zip(gradients(student), plain, strict=True)]
    terms, count = [], 0
    for i in CHOSEN:
        sequence, advantages = experience.sequences[i], experience.advantages[i]
        count += len(sequence.positions)
        falls = experience.old_logprobs[i] - logprobs_of(student, sequence)
        lengths = turn_lengths(sequence)
        for fall, advantage in zip(falls.split(lengths), advantages.split(lengths), strict=True):
            good = [own for own, a in zip(fall, advantage, strict=True) if a >= 0]
            if good and sum(map(float, good)) > 0:
                terms += [own for own in good if own > 0]
    assert 0 < len(terms) < count
    (0.5 * torch.stack(terms).sum() / count).backward()
    close(found, gradients(student), 1e-3, 1e-5)
    assert metrics["preserve_loss"] == pytest.approx(float(torch.stack(terms).sum()) / count, rel=1e-3)


def test_reference_reads_guided_episodes_alone(parts: Parts) -> None:
    seen: list[int] = []
    parts[1].base_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    updater = guided(parts, "reverse_kl", 0.3)
    for gate, read in ((torch.tensor([1.0, 0, 0, 1, 0, 0, 1]), [2]), (torch.zeros(7), [])):
        seen.clear()
        metrics = updater._actor_gradient(replace(experience_of(), gate=gate), CHOSEN)
        assert seen == read and ("kl_inside" in metrics) == bool(read)


@given(count=st.integers(1, 200), size=st.integers(1, 70))
def test_mini_batches_keep_the_order_and_are_even(count: int, size: int) -> None:
    parts = mini_batches(list(range(count)), size)
    assert [i for part in parts for i in part] == list(range(count))
    lengths = {len(part) for part in parts}
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1
    assert len(parts) == -(-count // size)
    if count % size == 0:  # nothing failed: the mini-batches of the paper
        assert lengths == {size}


def test_critic_starts_as_the_students_backbone_with_a_head_that_says_0(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    student = tiny_model(tokenizer)
    critic = Critic(student)
    sequences = [model_sequence(random_episode(seed)) for seed in range(4)]
    batch = collate(sequences, torch.device("cpu"))
    assert critic(batch).tolist() == [0.0] * len(batch.targets)
    torch.nn.init.normal_(critic.head.weight)
    for sequence, values in zip(sequences, batch.split(critic(batch)), strict=True):
        states = student.base_model(input_ids=torch.tensor([sequence.ids])).last_hidden_state[0]
        before = states[[position - 1 for position in sequence.positions]]
        close(values, critic.head(before)[:, 0], atol=1e-5)
    with torch.no_grad():
        for parameter in critic.backbone.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in student.parameters() if parameter.ndim > 1)
