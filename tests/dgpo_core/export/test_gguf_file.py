"""GGUF files against transformers' own reader of them, and llama.cpp's tokens against transformers'."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.engine import Request, generate
from dgpo_core.agent.llama_cpp_engine import GGUF_FILE, LlamaCppEngine
from dgpo_core.agent.loop import STOP
from dgpo_core.agent.prompts import encode_prompt, prompt_text
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import GREEDY, RolloutConfig, Sampling
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.export.gguf_file import Precision, pre_tokenizer, write_gguf
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.world.facts import World
from dgpo_core.world.questions import Article, write_questions

pytest.importorskip("gguf", reason="needs the extra gguf")

TEACHER = str(Path(__file__).resolve().parents[3] / "models" / "teacher")
NEVER = ("never written",)


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return load_model(TEACHER)


@pytest.fixture(scope="module")
def words() -> Any:
    return load_tokenizer(TEACHER)


@pytest.fixture(scope="module")
def requests(world: World, articles: list[Article], words: Any) -> list[Request]:
    questions = write_questions(world, articles)["onehop", "test"][:20]
    return [Request(encode_prompt(q.question, "short", words), 32, (i,)) for i, q in enumerate(questions)]


def random_llama(tokenizer: PreTrainedTokenizerFast, more: int) -> PreTrainedModel:
    """Grouped heads, a head of its own, Llama 3's rotation, and `more` rows that no token has."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer) + more,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1000.0, "original_max_position_embeddings": 64, **scaling
        },
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.eval()
    return model


def exported(model: PreTrainedModel, tokenizer: Any, folder: Path, precision: Precision = "f32") -> Path:
    write_gguf(model, tokenizer, folder / GGUF_FILE, precision, "a model")
    for part in (model.config, model.generation_config):
        part.save_pretrained(folder)
    return folder


def greedy(
    engine: Any, requests: list[Request], stop: tuple[str, ...] = STOP
) -> tuple[list[Any], list[float]]:
    found = generate(engine, requests, GREEDY, stop)
    return [(one.token_ids, one.finish) for one in found], [p for one in found for p in one.logprobs]


class TestTransformersReads:
    """`gguf_file=` of transformers knows the format without us."""

    @pytest.mark.parametrize(("precision", "tolerance"), [("f32", 1e-6), ("f16", 0.001), ("q8_0", 0.02)])
    def test_the_same_logits(
        self, teacher: PreTrainedModel, words: Any, tmp_path: Path, precision: Precision, tolerance: float
    ) -> None:
        exported(teacher, words, tmp_path, precision)
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=GGUF_FILE, dtype=torch.float32)
        ids = torch.arange(40)[None] * 13
        with torch.inference_mode():
            ours = teacher(ids).logits
            difference = ((read(ids).logits - ours).norm() / ours.norm()).item()
        assert difference <= tolerance
        assert precision == "f32" or difference > 0


class TestLlamaCpp:
    """The real llama.cpp."""

    @pytest.fixture(scope="class")
    def folder(self, teacher: PreTrainedModel, words: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
        pytest.importorskip("xllamacpp", reason="needs the extra llama-cpp")
        return exported(teacher, words, tmp_path_factory.mktemp("gguf"))

    @pytest.fixture(scope="class")
    def engine(self, folder: Path, words: Any) -> LlamaCppEngine:
        return LlamaCppEngine(folder, words, 512, slots=4)

    @pytest.fixture(scope="class")
    def ours(self, teacher: PreTrainedModel, words: Any) -> TransformersEngine:
        return TransformersEngine(teacher, words, RolloutConfig(precision="float32"))

    def test_twenty_questions_have_the_same_greedy_tokens(
        self, engine: LlamaCppEngine, ours: TransformersEngine, requests: list[Request]
    ) -> None:
        (tokens, logprobs), (expected, theirs) = greedy(engine, requests), greedy(ours, requests)
        assert tokens == expected
        assert logprobs == pytest.approx(theirs, abs=1e-3)

    def test_tokens_that_are_parts_of_a_character_have_no_probability(
        self,
        engine: LlamaCppEngine,
        ours: TransformersEngine,
        requests: list[Request],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """llama.cpp leaves all probabilities out of an answer that is only such tokens."""
        post = engine._http.post

        def without(url: str, **given: Any) -> httpx.Response:
            answer = post(url, **given).json()
            return httpx.Response(
                200, json={k: v for k, v in answer.items() if k != "completion_probabilities"}
            )

        monkeypatch.setattr(engine._http, "post", without)
        tokens, logprobs = greedy(engine, requests[:2])
        assert tokens == greedy(ours, requests[:2])[0]
        assert set(logprobs) == {0.0}

    @pytest.mark.parametrize("more", [0, 8])
    def test_llama_too(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, folder: Path, more: int
    ) -> None:
        llama = random_llama(tokenizer, more)
        requests = [Request([100 + i, *range(7, 90)], 12, (i,)) for i in range(20)]
        ours = TransformersEngine(llama, tokenizer, RolloutConfig(precision="float32"))
        engine = LlamaCppEngine(exported(llama, tokenizer, tmp_path), tokenizer, 256, slots=4)
        (tokens, logprobs), (expected, theirs) = (
            greedy(engine, requests, NEVER),
            greedy(ours, requests, NEVER),
        )
        assert tokens == expected
        known = [pair for pair in zip(logprobs, theirs, strict=True) if pair[0] != 0.0]
        assert len(theirs) / 2 < len(known) < len(theirs)  # some tokens end inside a character
        # llama.cpp's log-probabilities are over all rows
        tolerance = 0.5 if more else 1e-3
        assert [own for own, _ in known] == pytest.approx([other for _, other in known], abs=tolerance)

    def test_it_splits_texts_as_our_tokenizer_does(self, engine: LlamaCppEngine, words: Any) -> None:
        """In NFC: llama.cpp does not normalise."""
        for text in (
            "Who's 1234 years older?\n\n  Ödön's <think> 中文\t",
            prompt_text("Was it?", "paper", words),
        ):
            answer = engine._http.post("/tokenize", json={"content": text, "parse_special": True}).json()
            assert answer["tokens"] == words.encode(text, add_special_tokens=False), text

    def test_samples_are_those_of_the_distribution(
        self, engine: LlamaCppEngine, ours: TransformersEngine, requests: list[Request]
    ) -> None:
        """The mean log-probability of samples is minus the entropy, within five standard errors."""

        def samples(engine: Any) -> torch.Tensor:
            many = [Request(requests[0].token_ids[:12], 1, (7, i)) for i in range(150)]
            return torch.tensor([one.logprobs[0] for one in generate(engine, many, Sampling(), NEVER)])

        theirs, own = samples(engine), samples(ours)
        assert abs(theirs.mean() - own.mean()) < 5 * (2 * own.var() / len(own)).sqrt()
        torch.testing.assert_close(theirs, samples(engine), rtol=0, atol=1e-3)  # the seed decides

    def test_whoever_listens_ends_its_request_alone(
        self, engine: LlamaCppEngine, requests: list[Request]
    ) -> None:
        heard: list[int] = []

        def leave(token: int) -> None:
            heard.append(token)
            if len(heard) == 3:
                raise InfrastructureError("left")

        session = engine.session(STOP)
        left = Request(requests[0].token_ids, 32, (0,), on_token=leave)
        session.add([left, requests[1]], GREEDY)
        found: dict[int, Any] = {}
        while len(found) < 2:
            found |= {id(request): result for request, result in session.advance()}
        session.close()
        assert str(found[id(left)]) == "left" and len(heard) == 3
        assert (found[id(requests[1])].token_ids, heard[:2]) == (
            greedy(engine, requests[1:2])[0][0][0],
            greedy(engine, requests[:1])[0][0][0][:2],
        )

    def test_what_does_not_fit(self, engine: LlamaCppEngine) -> None:
        with pytest.raises(InfrastructureError, match="exceeds the available context"):
            greedy(engine, [Request([7] * 4000, 8, (0,))])

    def test_no_model(self, words: Any, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"model\.gguf: no such file; `dgpo export"):
            LlamaCppEngine(tmp_path, words, 64)


def test_names_of_splitting() -> None:
    """As the tokenizers of SmolLM2 and GPT-2 describe it."""
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_tokenizer({"type": "Sequence", "pretokenizers": [digits, bytes_alone]}) == "smollm"
    assert pre_tokenizer(bytes_alone) == "gpt-2"
    with pytest.raises(UserError, match="splitting"):
        pre_tokenizer({"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, bytes_alone]})


def test_what_llama_cpp_does_not_know_is_refused(model: PreTrainedModel, tmp_path: Path, words: Any) -> None:
    with pytest.raises(UserError, match="no name for this tokenizer's way of splitting"):
        pre_tokenizer({"type": "Metaspace"})
    other: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=64)
    )
    with pytest.raises(UserError, match="architecture gpt2"):
        write_gguf(other, words, tmp_path / GGUF_FILE, "f16", "a model")
    with pytest.raises(UserError, match="q8_0"):
        write_gguf(model, words, tmp_path / GGUF_FILE, "q8_0", "rows that 32 does not divide")
