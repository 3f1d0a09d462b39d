"""The default engine against transformers' own generation and plain forward passes (float32)."""

import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.engine import FinishReason, Request
from dgpo_core.agent.transformers_engine import TransformersEngine, _Row
from dgpo_core.config.agent import GREEDY, RolloutConfig, Sampling
from dgpo_core.models import build_model
from tests.dgpo_core.making import SHAPE, padded

FLOAT32 = RolloutConfig(precision="float32")
WARM = Sampling(temperature=0.7)
NEVER = ("never written",)


def prompts(count: int = 9, vocabulary: int = 300) -> list[Request]:
    """Requests of mixed lengths and limits."""
    rng = random.Random(4)
    return [
        Request([rng.randrange(vocabulary) for _ in range(rng.randint(1, 30))], rng.randint(1, 14), (i, 5))
        for i in range(count)
    ]


def forward_logprobs(
    model: PreTrainedModel, request: Request, ids: list[int], temperature: float
) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([request.token_ids + ids])).logits[0].float() / temperature
    return logits.log_softmax(-1)[len(request.token_ids) - 1 : -1]


@pytest.fixture
def engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> TransformersEngine:
    return TransformersEngine(model, tokenizer, FLOAT32)


def test_greedy_is_that_of_transformers(engine: TransformersEngine, model: PreTrainedModel) -> None:
    requests = prompts()
    answers = engine.generate(requests, GREEDY, NEVER)
    for request, answer in zip(requests, answers, strict=True):
        generated = model.generate(  # type: ignore[operator]
            torch.tensor([request.token_ids]), max_new_tokens=request.max_new_tokens, do_sample=False
        )
        assert answer.token_ids == generated[0, len(request.token_ids) :].tolist()
    assert len({token for answer in answers for token in answer.token_ids}) > 5


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), WARM])
def test_logprobs_are_those_of_a_forward_pass(
    engine: TransformersEngine, model: PreTrainedModel, sampling: Sampling
) -> None:
    requests = prompts()
    for request, answer in zip(requests, engine.generate(requests, sampling, NEVER), strict=True):
        table = forward_logprobs(model, request, answer.token_ids, sampling.temperature or 1.0)
        expected = table[torch.arange(len(answer.token_ids)), answer.token_ids]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_samples_follow_the_distribution(engine: TransformersEngine, model: PreTrainedModel) -> None:
    """Each token is the inverse of the cumulative distribution at the request's next uniform number."""
    requests = prompts()
    for request, answer in zip(requests, engine.generate(requests, WARM, NEVER), strict=True):
        table = forward_logprobs(model, request, answer.token_ids, WARM.temperature).double().exp().numpy()
        uniforms = np.random.default_rng(request.seed).random(request.max_new_tokens)
        for probabilities, uniform, token in zip(table, uniforms, answer.token_ids, strict=False):
            cumulative = probabilities.cumsum()
            below = cumulative[token - 1] if token else 0.0
            assert below - 1e-5 <= uniform * cumulative[-1] <= cumulative[token] + 1e-5


@pytest.mark.parametrize("batch_tokens", [65_536, 120, 1])
def test_sampling_does_not_depend_on_the_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_tokens: int
) -> None:
    engine = TransformersEngine(
        model, tokenizer, RolloutConfig(precision="float32", batch_tokens=batch_tokens)
    )
    requests = prompts(12)
    together = engine.generate(requests, Sampling(), NEVER)
    backwards = engine.generate(requests[::-1], Sampling(), NEVER)[::-1]
    for request, first, second in zip(requests, together, backwards, strict=True):
        (alone,) = engine.generate([request], Sampling(), NEVER)
        assert first.token_ids == second.token_ids == alone.token_ids
        assert first.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_seeds_differ(engine: TransformersEngine) -> None:
    requests = [Request([1, 2, 3], 12, (seed,)) for seed in range(5)]
    answers = engine.generate(requests, Sampling(), NEVER)
    assert len({tuple(answer.token_ids) for answer in answers}) == 5


def test_batches_stay_in_the_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(model, tokenizer, RolloutConfig(batch_tokens=100))
    requests = prompts(30)
    batches = engine._batches([_Row(request, GREEDY) for request in requests])
    lengths = [len(row.request.token_ids) for batch in batches for row in batch]
    assert lengths == sorted(len(request.token_ids) for request in requests)
    assert max(map(len, batches)) > 1
    for batch in batches:
        asked = [row.request for row in batch]
        longest = max(len(r.token_ids) for r in asked) + max(r.max_new_tokens for r in asked)
        assert len(batch) == 1 or longest * len(batch) <= 100


def test_length_ends_a_generation(engine: TransformersEngine) -> None:
    answers = engine.generate([Request([5, 6], 7, (0,)), Request([5], 1, (0,))], GREEDY, NEVER)
    assert [(len(a.token_ids), a.finish) for a in answers] == [
        (7, FinishReason.LENGTH),
        (1, FinishReason.LENGTH),
    ]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that every tag has many tokens; no tag is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|eot|>"],
    )


TEXTS = {
    "A:": "<think> é </think><search> red house </search> and so on",
    "a longer prompt B:": "<answer> blue </answer>\n\n</search> and so on",
    "C:": "hello<|im_end|>and so on",
    "D:": "<search> a > b</answer and so on, without an end",
    "E:": "bye<|eot|>and so on",
}


@pytest.fixture(scope="module")
def parrot() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model that knows five texts by heart."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = build_model(SHAPE.model_copy(update={"hidden_size": 64, "intermediate_size": 128}), tokenizer)
    rows = [tokenizer.encode(prompt + text) for prompt, text in TEXTS.items()]
    ids = torch.full((len(rows), max(map(len, rows))), -100)
    for row, encoded in zip(ids, rows, strict=True):
        row[: len(encoded)] = torch.tensor(encoded)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(ids.clamp(min=0), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.1:
            break
    return model.eval(), tokenizer


def test_stop_strings_of_many_tokens(parrot: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = parrot
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|eot|>")]
    engine = TransformersEngine(model, tokenizer, FLOAT32)
    requests = [Request(tokenizer.encode(prompt), 48, (0,)) for prompt in TEXTS]
    answers = engine.generate(requests, GREEDY, ("</search>", "</answer>"))
    assert [tokenizer.decode(answer.token_ids) for answer in answers] == [
        "<think> é </think><search> red house </search>",
        "<answer> blue </answer>",
        "hello<|im_end|>",
        TEXTS["D:"][:48],
        "bye<|eot|>",
    ]
    assert [answer.finish for answer in answers] == [
        FinishReason.STOP, FinishReason.STOP, FinishReason.EOS, FinishReason.LENGTH, FinishReason.EOS
    ]  # fmt: skip
    assert all(len(answer.token_ids) == len(answer.logprobs) for answer in answers)


def test_eos_of_the_tokenizer_alone(parrot: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = parrot
    model.generation_config.eos_token_id = None
    engine = TransformersEngine(model, tokenizer, FLOAT32)
    answers = engine.generate([Request(tokenizer.encode(p), 12, (0,)) for p in ("C:", "E:")], GREEDY, NEVER)
    assert [answer.finish for answer in answers] == [FinishReason.EOS, FinishReason.LENGTH]


def test_bfloat16_runs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(model, tokenizer, RolloutConfig())
    (answer,) = engine.generate([Request([1, 2, 3], 5, (0,))], Sampling(), NEVER)
    table = forward_logprobs(model, Request([1, 2, 3], 5, (0,)), answer.token_ids, 1.0)
    expected = table[torch.arange(len(answer.token_ids)), answer.token_ids]
    assert answer.logprobs == pytest.approx(expected.tolist(), abs=0.3)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), WARM])
def test_rows_without_a_token_have_no_probability(
    engine: TransformersEngine, tokenizer: PreTrainedTokenizerFast, sampling: Sampling
) -> None:
    """The head of Qwen2.5 has 271 rows more than its tokenizer has tokens; here likely ones. All is as if
    they were not there, what is sampled and its log-probabilities."""
    wider = padded(engine.model, 64)
    logits = wider(torch.tensor([[1, 2, 3]])).logits[0, -1]
    assert logits.argmax() >= len(tokenizer)
    requests = prompts()
    found = TransformersEngine(wider, tokenizer, FLOAT32).generate(requests, sampling, NEVER)
    for own, other in zip(found, engine.generate(requests, sampling, NEVER), strict=True):
        assert (own.token_ids, own.finish) == (other.token_ids, other.finish)
        assert own.logprobs == pytest.approx(other.logprobs, abs=1e-5)
