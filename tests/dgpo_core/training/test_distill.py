"""Distillation: gradients against a loop over single tokens, resuming, what is logged, TAID's share."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from dgpo_core.agent.episode import Episode
from dgpo_core.config.training import DistillConfig, TaidConfig, WatchConfig
from dgpo_core.errors import NotFinite, UserError
from dgpo_core.training.batches import model_sequence
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.distill import Distiller, TaidSchedule
from dgpo_core.training.episode_sources import EpisodeSource, Metrics, StudentEpisodes, TeacherEpisodes
from dgpo_core.training.watch import BAD, Watch
from tests.dgpo_core.making import (
    distillation,
    exact,
    gradients,
    padded,
    random_episode,
    tiny_model,
    weights_of,
)

Models = tuple[PreTrainedModel, PreTrainedModel]  # student, teacher
CONFIG = DistillConfig(epochs=3, batch_size=3, learning_rate=1e-2, ce_weight=0.7, kl_weight=0.4)
ON_POLICY = DistillConfig.model_validate({"on_policy": {"steps": 4, "batch_size": 3, "dev_every": 2}})
EPISODES = [random_episode(seed) for seed in range(8)]
SEQUENCES = [model_sequence(episode) for episode in EPISODES]


def distiller(
    models: Models,
    objective: str = "kd",
    tokens: int = 10_000,
    config: DistillConfig = CONFIG,
    source: EpisodeSource | None = None,
    bad_steps: int = 1,
) -> Distiller:
    """On the teacher's episodes, or on `source`."""
    student, teacher = models
    recipe = distillation(objective, "student" if isinstance(source, StudentEpisodes) else "teacher")
    source = source or TeacherEpisodes(EPISODES, config, seed=0)
    loaded = None if objective == "ce" else teacher
    watch = Watch(WatchConfig(max_bad_steps=bad_steps))
    return Distiller(student, loaded, recipe, config, exact(tokens), source, watch=watch)


def train(made: Distiller, folder: Path, kill_at: int | None = None) -> list[Metrics]:
    em = iter([0.1, 0.2, 0.3])

    def report(steps: int, rows: list[Metrics]) -> None:
        assert steps == made.source.steps
        if len(rows) == kill_at:
            raise KeyboardInterrupt

    return made.train(Checkpoint(folder), lambda: next(em), report)


def pair(tokenizer: Tokenizer) -> Models:
    return tiny_model(tokenizer, 1), tiny_model(tokenizer, 2)


@pytest.fixture
def models(tokenizer: Tokenizer) -> Models:
    return pair(tokenizer)


@pytest.mark.parametrize("objective", ["kd", "ce", "taid"])
def test_resumed_run_is_bit_identical(tokenizer: Tokenizer, tmp_path: Path, objective: str) -> None:
    whole, killed, resumed = (distiller(pair(tokenizer), objective) for _ in range(3))
    rows = train(whole, tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row.get("dev_em") for row in rows] == [None, None, 0.1, None, None, 0.2, None, None, 0.3]
    assert rows[0]["learning_rate"] == 1e-2
    assert rows[-1]["learning_rate"] < 1e-3
    assert objective == "taid" or rows[-1]["ce"] < 0.8 * rows[0]["ce"]
    with pytest.raises(KeyboardInterrupt):
        train(killed, tmp_path / "killed", kill_at=5)
    again, plain = (
        [{key: value for key, value in row.items() if key != "dev_em"} for row in each]
        for each in (train(resumed, tmp_path / "killed"), rows)
    )
    assert again == plain
    weights = resumed.student.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in whole.student.state_dict().items())


Pair = tuple[torch.Tensor, torch.Tensor]
REFERENCE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {  # of logits, teacher first
    "kd": lambda p, q: kl_divergence(Categorical(logits=p), Categorical(logits=q)),
    "reverse_kl": lambda p, q: kl_divergence(Categorical(logits=q), Categorical(logits=p)),
    "skew_kl": lambda p, q: kl_divergence(
        Categorical(logits=p), Categorical(probs=0.1 * p.softmax(-1) + 0.9 * q.softmax(-1))
    ),
    "taid": lambda p, q: kl_divergence(Categorical(logits=0.6 * q.detach() + 0.4 * p), Categorical(logits=q)),
}


def reference_losses(student: PreTrainedModel, teacher: PreTrainedModel, objective: str) -> Pair:
    """Means of CE and divergence over the tokens that the model wrote, by episode, without padding."""
    cross_entropies, divergences = [], []
    for episode in EPISODES:
        ids = torch.tensor([episode.token_ids])
        with torch.no_grad():
            target = teacher(ids).logits[0]
        own = student(ids).logits[0]
        for t in model_sequence(episode).positions:
            cross_entropies.append(-Categorical(logits=own[t - 1]).log_prob(ids[0, t]))
            divergences.append(REFERENCE[objective](target[t - 1], own[t - 1]))
    return torch.stack(cross_entropies).mean(), torch.stack(divergences).mean()


@pytest.mark.parametrize(
    ("objective", "tokens"), [("kd", 1), ("kd", 10_000), *((objective, 60) for objective in REFERENCE)]
)
def test_losses_and_gradients(models: Models, objective: str, tokens: int) -> None:
    """Of kd, eq. 1; the other objectives are a divergence alone."""
    student, teacher = models
    row = distiller(models, objective, tokens)._averages(SEQUENCES)
    found = gradients(student)
    ce, divergence = reference_losses(student, teacher, objective)
    loss = 0.7 * ce + 0.4 * divergence if objective == "kd" else divergence
    loss.backward()
    expected = {"loss": loss.item(), "ce": ce.item(), "divergence": divergence.item()}
    assert row == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(found, gradients(student), rtol=2e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_k1_is_the_log_ratio_of_sampled_tokens(models: Models) -> None:
    student, teacher = models
    source = StudentEpisodes(lambda *_: EPISODES, 3, ON_POLICY, seed=0)
    row = distiller(models, "k1", 60, ON_POLICY, source)._averages(SEQUENCES)
    found, gaps = gradients(student), []
    for sequence in SEQUENCES:
        ids, places = torch.tensor([sequence.ids]), torch.tensor(sequence.positions)
        own = student(ids).logits[0].log_softmax(-1)[places - 1, ids[0, places]]
        with torch.no_grad():
            theirs = teacher(ids).logits[0].log_softmax(-1)[places - 1, ids[0, places]]
        gaps.append(own - theirs)
    loss = torch.cat(gaps).mean()
    loss.backward()
    assert row["loss"] == row["divergence"] == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(found, gradients(student), rtol=2e-3, atol=1e-6)


def test_best_epoch_is_kept_and_patience_ends_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"patience": 1})
    seen: list[dict[str, torch.Tensor]] = []

    def trained(folder: str, kill_at: int | None = None) -> list[Metrics]:
        models = pair(tokenizer)

        def evaluate() -> float:
            seen.append(weights_of(models[0]))
            return [0.3, 0.2, 0.9][len(seen) - 1]

        def report(_: int, rows: list[Metrics]) -> None:
            if len(rows) == kill_at:
                raise KeyboardInterrupt

        rows = distiller(models, config=config).train(Checkpoint(tmp_path / folder), evaluate, report)
        assert all(torch.equal(seen[0][name], value) for name, value in models[0].state_dict().items())
        return rows

    rows = trained("whole")
    assert [row["dev_em"] for row in rows if "dev_em" in row] == [0.3, 0.2] and len(rows) == 6
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        trained("killed", kill_at=4)
    assert trained("killed") == rows


def test_validation_loss_steers_the_mixture(models: Models, tmp_path: Path) -> None:
    """DistiLLM's mixture hears of the untrained student's loss first, then once an epoch."""
    heard: list[float] = []

    class Source(TeacherEpisodes):
        def validated(self, loss: float) -> None:
            heard.append(loss)

    source = Source(EPISODES[1:], CONFIG, 0)
    source.held_out = EPISODES[:1]
    made = distiller(models, "skew_kl", source=source)
    untrained = made.loss(EPISODES[:1])
    rows = train(made, tmp_path)
    assert heard[0] == pytest.approx(untrained)
    assert heard[1:] == [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(heard) == 4 and heard[-1] == pytest.approx(made.loss(EPISODES[:1]))


SAMPLED = set("em response_tokens searches hit invalid_actions well_formed no_answer entropy".split())


def test_on_policy_distillation_logs_what_its_episodes_say(models: Models, tmp_path: Path) -> None:
    def rollout(chosen: list[int], step: int) -> list[Episode]:
        return [replace(random_episode(100 * step + i), invalid_actions=step) for i in chosen]

    source = StudentEpisodes(rollout, 3, ON_POLICY, seed=0)  # every step has the questions 0, 1 and 2
    rows = train(distiller(models, "reverse_kl", config=ON_POLICY, source=source), tmp_path)
    for step, row in enumerate(rows):
        episodes = [random_episode(100 * step + i) for i in range(3)]
        assert row["invalid_actions"] == step
        assert row["response_tokens"] == pytest.approx(sum(e.model_tokens for e in episodes) / 3)
        sampled = [p for e in episodes for p, owner in zip(e.logprobs, e.owners, strict=True) if owner == 1]
        assert row["entropy"] == pytest.approx(-sum(sampled) / len(sampled))
        assert set(row) > SAMPLED


@pytest.mark.parametrize("objective", ["kd", "ce", "taid", "skew_kl", "reverse_kl"])
def test_a_rate_that_is_too_high_ends_the_training(models: Models, tmp_path: Path, objective: str) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 1e30})
    made = distiller(models, objective, config=config)
    done: list[int] = []
    said = r"the loss of step 2 is not a number; lower distill\.learning_rate \(now 1e\+30\)"
    with pytest.raises(NotFinite, match=said):
        made.train(Checkpoint(tmp_path), lambda: 0.0, lambda _, rows: done.append(len(rows)))
    assert done == [1]
    assert Checkpoint(tmp_path).load() is None


def test_what_is_no_number_changes_no_weight_and_no_checkpoint(models: Models, tmp_path: Path) -> None:
    """A teacher that breaks after the first epoch: the checkpoint is that epoch's."""
    student, teacher = models
    earlier: list[dict[str, torch.Tensor]] = []

    def look() -> float:
        earlier.append(weights_of(student))
        with torch.no_grad():
            teacher.get_output_embeddings().weight[7, 7] = math.inf
        return 0.5

    with pytest.raises(NotFinite, match="the loss of step 4 is not a number"):
        distiller(models).train(Checkpoint(tmp_path), look, lambda *_: None)
    state = Checkpoint(tmp_path).load()
    assert state is not None and len(state["rows"]) == 3
    assert all(torch.equal(earlier[0][name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize("objective", ["kd", "taid", "reverse_kl"])
def test_a_step_without_numbers_is_dropped(models: Models, tmp_path: Path, objective: str) -> None:
    """A teacher gives none in step 2 alone: no weight changes, nor TAID; the rest goes on."""
    student, teacher = models
    made = distiller(models, objective, bad_steps=3)
    weight, batch, seen = teacher.get_output_embeddings().weight, made.source.batch, list[Any]()
    whole = weight.detach().clone()

    def breaking(step: int) -> list[Episode]:
        seen.append((weights_of(student), made.taid.t))
        with torch.no_grad():
            weight.copy_(whole)
            weight[7, 7] = math.nan if step == 1 else whole[7, 7]
        return batch(step)

    made.source.batch = breaking  # type: ignore[method-assign]
    rows = train(made, tmp_path)
    assert [BAD in row for row in rows][:4] == [False, True, False, False]
    (before, t_before), (after, t_after) = seen[1:3]
    assert t_before == t_after and all(torch.equal(before[name], value) for name, value in after.items())
    assert not all(torch.equal(after[name], value) for name, value in student.state_dict().items())


def test_on_policy_names_its_own_rate_and_warms_up_by_itself(models: Models, tmp_path: Path) -> None:
    settings = {"warmup_steps": 9, "on_policy": {"steps": 4, "batch_size": 3, "warmup_steps": 2}}
    config = DistillConfig.model_validate(settings)
    source = StudentEpisodes(lambda chosen, _: [random_episode(i) for i in chosen], 20, config, seed=0)
    made = distiller(models, "reverse_kl", config=config, source=source)
    rows = train(made, tmp_path / "a")
    assert [row["learning_rate"] for row in rows] == pytest.approx([5e-7, 1e-6, 1e-6, 5e-7])

    def nothing(chosen: list[int], _: int) -> list[Episode]:
        raise NotFinite("log-probability of a sampled token", math.nan)

    made.source = StudentEpisodes(nothing, 20, config, seed=0)
    with pytest.raises(NotFinite, match=r"token of step 1 is .*lower distill\.on_policy\.learning_rate"):
        train(made, tmp_path / "b")


@pytest.mark.parametrize("objective", ["kd", "ce", "taid", "reverse_kl"])
@pytest.mark.parametrize("rows", [(64, 0), (0, 64), (64, 128)])
def test_rows_without_a_token_count_for_nothing(
    models: Models, objective: str, rows: tuple[int, int]
) -> None:
    """Likely ones, of the student or of the teacher, more or fewer than the other has: loss and gradients
    are those without them, and they have none."""
    student, teacher = models
    known = len(student.get_output_embeddings().weight)
    row = distiller(models, objective, 60)._averages(SEQUENCES)
    expected = gradients(student)
    wider = padded(student, rows[0])
    made = replace(distiller((wider, padded(teacher, rows[1])), objective, 60), known=known)
    assert made._averages(SEQUENCES) == pytest.approx(row, rel=1e-4)
    for found, plain in zip(gradients(wider), expected, strict=True):
        torch.testing.assert_close(found[: len(plain)], plain, rtol=1e-3, atol=1e-6)
        assert not found[len(plain) :].any()


def test_an_episode_with_an_id_that_no_token_has_is_named(models: Models) -> None:
    made = distiller(models)
    strange = replace(EPISODES[0], token_ids=[*EPISODES[0].token_ids[:-1], made.vocabulary])
    with pytest.raises(UserError, match=rf"onehop q0 has the token {made.vocabulary}.*collect .* again"):
        made.loss([strange])


LOSSES = st.lists(st.floats(0, 1e6), min_size=1, max_size=40)


def recurrence(losses: list[float], steps: int, config: TaidConfig) -> list[float]:
    """docs/method.md, "Divergences", line by line; the first loss only becomes the previous one."""
    start, end, decay = config.start, config.end, config.decay
    t, m, previous, found = start, 0.0, losses[0], [start]
    for step, loss in enumerate(losses[1:], 2):
        change = (previous - loss) / (previous + 1e-15)
        m = decay * m + (1 - decay) * change
        sigmoid = 1 / (1 + math.exp(-m)) if m > -700 else 0.0
        t = min(end, max(start + (end - start) * step / steps, t + 5e-4 * sigmoid * (1 - t)))
        previous = loss
        found.append(t)
    return found


@pytest.mark.parametrize("config", [TaidConfig(), TaidConfig(start=0.2, end=0.9, decay=0.5)])
@pytest.mark.parametrize("steps", [None, 100, 10**9])
@given(LOSSES)
def test_taids_share_is_its_recurrence(config: TaidConfig, steps: int | None, losses: list[float]) -> None:
    steps = steps or len(losses)
    schedule, found = TaidSchedule(steps, config), []
    for step, loss in enumerate(losses, 1):
        schedule.update(loss, step)
        found.append(schedule.t)
    assert found == pytest.approx(recurrence(losses, steps, config), abs=1e-12)
    assert found == sorted(found)


def test_taids_share_survives_an_exploding_loss() -> None:
    schedule = TaidSchedule(10, TaidConfig())
    for step, loss in enumerate([0.0, 1e30, 1e-30, 1e30], 1):
        schedule.update(loss, step)
    assert schedule.t == pytest.approx(0.4 + 0.6 * 4 / 10)


@given(LOSSES, st.integers(0, 40))
def test_taids_share_continues_exactly_from_its_state(losses: list[float], kill_at: int) -> None:
    whole, killed = (TaidSchedule(50, TaidConfig()) for _ in range(2))
    for step, loss in enumerate(losses, 1):
        if step == kill_at:
            state, killed = killed.state_dict(), TaidSchedule(50, TaidConfig())
            killed.load_state_dict(state)
        for schedule in (whole, killed):
            schedule.update(loss, step)
        assert whole.t == killed.t
