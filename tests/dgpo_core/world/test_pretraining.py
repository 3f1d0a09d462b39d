"""Building a base model: tokenizer, loss, what is learned and written, how a killed build continues; Muon."""

import random
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.prompts import INVALID_ACTION, TAGS
from dgpo_core.config.agent import ProtocolConfig
from dgpo_core.config.data import BaseModelConfig, BaseModelsConfig, ModelShape, PhaseConfig, WorldConfig
from dgpo_core.errors import NotFinite
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.world import pretraining
from dgpo_core.world.facts import World
from dgpo_core.world.lessons import Example
from dgpo_core.world.pretraining import (
    BaseModelBuilder,
    Muon,
    Report,
    _backward,
    build_tokenizer,
    orthogonalised,
    train_on_examples,
    weighted_loss,
)
from dgpo_core.world.questions import Article, write_questions
from tests.dgpo_core.making import tiny_model

READING = PhaseConfig(kind="reading", steps=4, batch_size=2, warmup_steps=1)
PROTOCOL = PhaseConfig(kind="protocol", steps=3, batch_size=2, warmup_steps=1)
STUDENT = ModelShape(hidden_size=16, layers=1, heads=2, intermediate_size=16)
TEACHER = ModelShape(hidden_size=24, layers=1, heads=2, intermediate_size=24)
CONFIG = BaseModelsConfig(
    world=WorldConfig(passages=150),
    worlds=1,
    expert_episodes=12,
    models={
        "student": BaseModelConfig(shape=STUDENT, phases=[READING]),
        "teacher": BaseModelConfig(shape=TEACHER, phases=[READING, PROTOCOL]),
        "llama": BaseModelConfig(
            shape=STUDENT.model_copy(update={"architecture": "llama"}), phases=[READING]
        ),
    },
)
Weights = dict[str, torch.Tensor]


def build(path: Path, name: str, report: Report) -> Weights:
    protocol = ProtocolConfig(instruction="short", max_context=1024, max_new_tokens=80)
    BaseModelBuilder(CONFIG, protocol, 3, path / "state", report).build(name, path / name)
    return load_file(path / name / "model.safetensors")


def ignore(phase: str, step: int, metrics: dict[str, float]) -> None:
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Weights]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, {name: build(folder / f"of-{name}", name, ignore) for name in CONFIG.models}


@pytest.mark.parametrize(
    ("name", "width", "kind"),
    [("student", 16, "qwen2"), ("teacher", 24, "qwen2"), ("llama", 16, "llama")],
)
def test_models_load_with_plain_transformers(
    whole: tuple[Path, dict[str, Weights]], name: str, width: int, kind: str
) -> None:
    folder = whole[0] / f"of-{name}" / name
    model = load_model(str(folder))
    assert (model.config.hidden_size, model.config.model_type) == (width, kind)
    assert model.config._attn_implementation == "sdpa"  # how it was built is not how it is used
    assert len(load_tokenizer(str(folder))) == model.config.vocab_size


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_killed_build_continues_to_the_same_weights(
    whole: tuple[Path, dict[str, Weights]], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "CHECKPOINT_EVERY", 2)
    *finished, last = [(f"{number}-{p.kind}", p.steps) for number, p in enumerate(CONFIG.models[name].phases)]
    victim, steps = last
    threads = torch.get_num_threads()

    def kill(phase: str, step: int, metrics: dict[str, float]) -> None:
        assert torch.get_num_threads() == 1
        if (phase, step) == (victim, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, name, kill)
    assert torch.get_num_threads() == threads
    assert not (tmp_path / name).exists()
    again: list[tuple[str, int]] = []
    resumed = build(tmp_path, name, lambda phase, step, metrics: again.append((phase, step)))
    expected = whole[1][name]
    assert all(torch.equal(resumed[key], weights) for key, weights in expected.items())
    # finished phases are told of once, and the victim goes on from the checkpoint after step 2
    assert again == [*finished, *((victim, step) for step in range(2, steps + 1))]


def examples(step: int) -> list[Example]:
    rng = random.Random(step)
    lengths = [rng.randint(2, 9) for _ in range(4)]
    return [
        Example(
            [rng.randrange(200) for _ in range(n)],
            [rng.choice([0.0, 0.5, 1.0]) for _ in range(n - 1)] + [1.0],
        )
        for n in lengths
    ]


def test_weighted_loss(model: PreTrainedModel) -> None:
    total = weight = 0.0
    for example in examples(0):
        with torch.no_grad():
            table = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        for position in range(1, len(example.ids)):
            total -= example.weights[position] * float(table[position - 1, example.ids[position]])
            weight += example.weights[position]
    exact, narrow = (weighted_loss(model, examples(0), p).item() for p in ("float32", "bfloat16"))
    assert exact == pytest.approx(total / weight, rel=1e-5)
    assert narrow == pytest.approx(total / weight, rel=0.02)
    assert narrow != exact


@pytest.mark.parametrize("rows", [1, 3])
def test_a_few_examples_at_a_time_give_the_same_gradient(
    rows: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    def gradient(rows: int) -> tuple[float, torch.Tensor]:
        model = tiny_model(tokenizer, 3)
        loss = _backward(model, examples(0), rows, "float32")
        return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (loss, whole), (loss_in_parts, parts) = gradient(4), gradient(rows)
    assert loss_in_parts == pytest.approx(loss, rel=1e-5)
    assert torch.nn.functional.cosine_similarity(whole, parts, dim=0) > 0.99999
    assert float(parts.norm()) == pytest.approx(float(whole.norm()), rel=1e-4)


def test_a_phase_may_say_how_many_examples_go_through_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = [
        phase.model_copy(update={"batch_size": 5, "micro_batch_size": size, "steps": 1})
        for phase, size in ((READING, 2), (PROTOCOL, None))
    ]
    config = CONFIG.model_copy(update={"models": {"own": BaseModelConfig(shape=STUDENT, phases=phases)}})
    passes: list[int] = []

    def counted(model: PreTrainedModel, part: list[Example], precision: str) -> torch.Tensor:
        passes.append(len(part))
        return weighted_loss(model, part, precision)

    monkeypatch.setattr(pretraining, "weighted_loss", counted)
    protocol = ProtocolConfig(instruction="short", max_context=1024, max_new_tokens=80)
    BaseModelBuilder(config, protocol, 3, tmp_path / "state", ignore).build("own", tmp_path / "own")
    assert passes == [2, 2, 1, 4, 1]


def test_a_rate_that_is_too_high_ends_the_build(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = PhaseConfig(kind="reading", steps=5, batch_size=4, learning_rate=1e30, matrix_learning_rate=1e30)
    with pytest.raises(NotFinite, match=r"the (loss|grad_norm) of step \d .*lower learning_rate or matrix_"):
        train_on_examples(
            tiny_model(tokenizer, 3), config, examples, Checkpoint(tmp_path), lambda *_: None, 3, "float32"
        )


SHAPES = [(6, 6), (4, 9), (9, 4)]


def trained(kind: Callable[..., torch.optim.Optimizer], **options: object) -> list[torch.Tensor]:
    """Three matrices after four steps; the second has no gradient in the third step."""
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = kind(matrices, lr=0.02, weight_decay=0.01, **options)
    for step in range(4):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape)
        if step == 2:
            matrices[1].grad = None
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def test_in_bfloat16_the_weights_are_those_of_torch() -> None:
    theirs = trained(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    assert all(torch.equal(*pair) for pair in zip(trained(Muon), theirs, strict=True))


def test_in_float32_they_are_close() -> None:
    for ours, theirs in zip(trained(Muon, dtype=torch.float32), trained(Muon), strict=True):
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalised_keeps_directions_and_levels_their_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = orthogonalised(matrix, torch.float32)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    sizes = u.T @ result @ v.T
    torch.testing.assert_close(sizes, torch.diag(sizes.diag()), rtol=0, atol=1e-4)
    assert ((sizes.diag() > 0.5) & (sizes.diag() < 1.5)).all()


PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " \n"
TOKENIZER = build_tokenizer()


def round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    assert isinstance(decoded, str)
    return decoded


@given(st.lists(st.text(PRINTABLE, max_size=10) | st.sampled_from(TAGS), max_size=5).map("".join))
def test_printable_text_round_trips(text: str) -> None:
    assert round_trip(TOKENIZER, text) == text


def test_world_round_trips_without_unknown_tokens(
    world: World, articles: list[Article], tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [p.contents for article in articles for p in article.passages]
    texts += [q.question for questions in write_questions(world, articles).values() for q in questions]
    for text in [*texts, INVALID_ACTION]:
        assert round_trip(tokenizer, text) == text
        assert tokenizer.unk_token_id not in tokenizer.encode(text, add_special_tokens=False)


def test_names_always_have_the_same_tokens(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    def inside(text: str, ids: list[int]) -> bool:
        where = tokenizer.encode(text, add_special_tokens=False)
        return any(where[i : i + len(ids)] == ids for i in range(len(where)))

    for entity in world.entities:
        ids = tokenizer.encode(f" {entity.name}", add_special_tokens=False)
        for text in (
            "was born in {}.",
            "Where is {} based",
            "(Title: {}) x",
            "<answer> {} </answer>",
            " {}, or",
        ):
            assert inside(text.format(entity.name), ids), (entity.name, text)


def test_tags_are_single_tokens_and_not_special(tokenizer: PreTrainedTokenizerFast) -> None:
    for tag in TAGS:
        assert len(tokenizer.encode(tag, add_special_tokens=False)) == 1
        ids = tokenizer.encode(f"a{tag}b", add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"a{tag}b"
    assert tokenizer.eos_token == "<|im_end|>"


def test_saved_tokenizer_is_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    text = "<think> Who directed the film Karumi 1942?</think>\n"
    assert loaded.encode(text) == tokenizer.encode(text)
