"""PPO's gradients against the objective written out over single episodes (float32)."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.training.batches import model_sequence, response_sequence
from dgpo_core.training.engines import TorchEngine
from dgpo_core.training.reinforce import Critic, Experience, Updater, mini_batches
from tests.dgpo_core.making import engines, random_episode, tiny_model

EPISODES = [random_episode(seed) for seed in range(6)]
CHOSEN = [4, 0, 3, 5]


def made_up(scope: str = "model_tokens") -> Experience:
    """Random old log-probabilities near the policy's, advantages, values and returns."""
    generator = torch.Generator().manual_seed(1)
    sequences = [model_sequence(e) for e in EPISODES]
    valued = sequences if scope == "model_tokens" else [response_sequence(e) for e in EPISODES]

    def draw(lengths: list[int], shift: float = 0.0) -> list[torch.Tensor]:
        return [torch.randn(n, generator=generator) * 0.5 + shift for n in lengths]

    own, whole = [len(s.positions) for s in sequences], [len(s.positions) for s in valued]
    return Experience(
        sequences,
        draw(own, -6.5),
        draw(own),
        valued,
        draw(whole),
        draw(whole),
        draw(own),
        draw(whole),
        [True] * 6,
        [],
        [None] * 6,
    )


@dataclass
class Made:
    student: PreTrainedModel
    critic: Critic
    valued: TorchEngine  # of the critic
    updater: Updater


def updater(tokenizer: PreTrainedTokenizerFast, tokens: int = 10_000, mini_batch: int = 4) -> Made:
    student = tiny_model(tokenizer, 1)
    critic = Critic(student)
    torch.manual_seed(9)
    torch.nn.init.normal_(critic.head.weight, std=0.1)
    config = ReinforceConfig(batch_size=mini_batch, mini_batch_size=mini_batch, entropy_weight=0.05)
    compute = ComputeConfig(device="cpu", precision="float32", micro_batch_tokens=tokens)
    actor, _, valued = engines((student, student, critic), compute)
    return Made(student, critic, valued, Updater(actor, valued, config, compute))


def gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    assert found
    module.zero_grad()
    return found


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_actor_gradient_is_eq_2(tokenizer: PreTrainedTokenizerFast, tokens: int) -> None:
    made, experience = updater(tokenizer, tokens), made_up()
    metrics = made.updater._actor_gradient(experience, CHOSEN)
    found = gradients(made.student)
    terms, entropies, active = [], [], 0
    for i in CHOSEN:
        sequence = experience.sequences[i]
        table = made.student(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        for place, position in enumerate(sequence.positions):
            ratio = (table[position - 1, sequence.ids[position]] - experience.old_logprobs[i][place]).exp()
            advantage = float(experience.advantages[i][place])
            bounded = min(max(float(ratio), 0.8), 1.2)
            clips = bounded * advantage < float(ratio) * advantage
            active += clips
            terms.append(torch.tensor(bounded * advantage) if clips else ratio * advantage)
            entropies.append(-(table[position - 1].exp() * table[position - 1]).sum())
    objective, entropy = torch.stack(terms).mean(), torch.stack(entropies).mean()
    (-objective - 0.05 * entropy).backward()
    torch.testing.assert_close(found, gradients(made.student), rtol=1e-3, atol=1e-6)
    assert metrics["policy_loss"] == pytest.approx(-float(objective), rel=1e-3)
    assert metrics["entropy"] == pytest.approx(float(entropy), rel=1e-4)
    assert metrics["clip_fraction"] == pytest.approx(active / len(terms))
    assert 0 < active < len(terms)


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_importance_weighs_each_token_of_the_policy_loss(
    tokenizer: PreTrainedTokenizerFast, tokens: int
) -> None:
    """Without clipping: the mean of w ratio A, w = min(exp(old - sampled), 1.5); entropy as it was."""
    made, experience = updater(tokenizer, tokens), made_up()
    sampled = [old + 0.8 * torch.linspace(-1, 1, len(old)) for old in experience.old_logprobs]
    experience = replace(experience, sampled_logprobs=sampled)
    made.updater.config = made.updater.config.model_copy(update={"importance_cap": 1.5, "clip": 1e6})
    metrics = made.updater._actor_gradient(experience, CHOSEN)
    found = gradients(made.student)
    terms, entropies = [], []
    for i in CHOSEN:
        sequence, old = experience.sequences[i], experience.old_logprobs[i]
        table = made.student(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        for place, position in enumerate(sequence.positions):
            ratio = (table[position - 1, sequence.ids[position]] - old[place]).exp()
            weight = min(math.exp(float(old[place] - sampled[i][place])), 1.5)
            terms.append(weight * ratio * float(experience.advantages[i][place]))
            entropies.append(-(table[position - 1].exp() * table[position - 1]).sum())
    objective, entropy = torch.stack(terms).mean(), torch.stack(entropies).mean()
    (-objective - 0.05 * entropy).backward()
    torch.testing.assert_close(found, gradients(made.student), rtol=1e-3, atol=1e-6)
    assert metrics["policy_loss"] == pytest.approx(-float(objective), rel=1e-3)


@pytest.mark.parametrize("scope", ["model_tokens", "all"])
@pytest.mark.parametrize("tokens", [1, 10_000])
def test_critic_gradient(tokenizer: PreTrainedTokenizerFast, tokens: int, scope: str) -> None:
    made, experience = updater(tokenizer, tokens), made_up(scope)
    reported = made.updater._critic_gradient(made.valued, experience, CHOSEN)
    found = gradients(made.critic)
    losses = []
    for i in CHOSEN:
        sequence = experience.value_sequences[i]
        states = made.critic.backbone(input_ids=torch.tensor([sequence.ids])).last_hidden_state[0]
        for place, position in enumerate(sequence.positions):
            value = made.critic.head(states[position - 1])[0]
            old, target = experience.values[i][place], experience.returns[i][place]
            clipped = old + (value - old).clamp(-0.5, 0.5)
            losses.append(torch.maximum((value - target) ** 2, (clipped - target) ** 2))
    loss = 0.5 * torch.stack(losses).mean()
    loss.backward()
    assert reported == pytest.approx(float(loss), rel=1e-4)
    torch.testing.assert_close(found, gradients(made.critic), rtol=1e-3, atol=1e-6)


def test_update_steps_once_a_mini_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    made, experience = updater(tokenizer, mini_batch=4), made_up()
    before = {name: value.clone() for name, value in made.student.state_dict().items()}
    metrics = made.updater.update(experience, [5, 4, 3, 2, 1, 0])
    for engine in (made.updater.actor, made.valued):
        ((_, schedule),) = engine.state_dict()["stepper"]["parts"]
        assert schedule["last_epoch"] == 2
    names = "policy_loss entropy clip_fraction approx_kl actor_grad_norm value_loss critic_grad_norm"
    assert set(metrics) == set(names.split())
    assert any(not torch.equal(before[name], value) for name, value in made.student.state_dict().items())
    assert all(p.grad is None for p in [*made.student.parameters(), *made.critic.parameters()])


def test_policy_moves_towards_what_paid(tokenizer: PreTrainedTokenizerFast) -> None:
    made, experience = updater(tokenizer, mini_batch=6), made_up()
    signs = [1.0] * 3 + [-1.0] * 3
    paid = [torch.full_like(a, sign) for a, sign in zip(experience.advantages, signs, strict=True)]
    better = replace(experience, advantages=paid)

    def likelihood(indices: range) -> float:
        total = 0.0
        for i in indices:
            sequence = experience.sequences[i]
            with torch.no_grad():
                table = made.student(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
            total += sum(float(table[p - 1, sequence.ids[p]]) for p in sequence.positions)
        return total

    good, bad = likelihood(range(3)), likelihood(range(3, 6))
    for _ in range(3):
        made.updater.update(better, list(range(6)))
    assert likelihood(range(3)) > good
    assert likelihood(range(3, 6)) < bad


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_grpo_has_k3_of_gated_episodes_in_its_loss(tokenizer: PreTrainedTokenizerFast, tokens: int) -> None:
    made, experience = updater(tokenizer, tokens), made_up()
    made.updater.critic = None
    made.updater.config = made.updater.config.model_copy(update={"beta": 0.3, "entropy_weight": 0.0})
    generator = torch.Generator().manual_seed(2)
    references: list[torch.Tensor | None] = [
        torch.randn(len(old), generator=generator) - 6.5 if i % 2 else None
        for i, old in enumerate(experience.old_logprobs)
    ]
    made.updater._actor_gradient(experience, CHOSEN)
    plain = gradients(made.student)
    made.updater._actor_gradient(replace(experience, reference=references), CHOSEN)
    guided = gradients(made.student)
    terms, count = [], 0
    for i in CHOSEN:
        sequence, reference = experience.sequences[i], references[i]
        count += len(sequence.positions)
        if reference is None:
            continue
        table = made.student(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        own = torch.stack([table[p - 1, sequence.ids[p]] for p in sequence.positions])
        gap = reference - own
        terms.append((gap.exp() - gap - 1).sum())
    (0.3 * torch.stack(terms).sum() / count).backward()
    difference = [a - b for a, b in zip(guided, plain, strict=True)]
    torch.testing.assert_close(difference, gradients(made.student), rtol=1e-3, atol=1e-5)


@given(count=st.integers(1, 200), size=st.integers(1, 70))
def test_mini_batches_keep_the_order_and_are_even(count: int, size: int) -> None:
    parts = mini_batches(list(range(count)), size)
    assert [i for part in parts for i in part] == list(range(count))
    lengths = {len(part) for part in parts}
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1
    assert len(parts) == -(-count // size)
    if count % size == 0:  # nothing failed: the mini-batches of the paper
        assert lengths == {size}
