"""The default engine against transformers' own generation and plain forward passes (float32)."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from dgpo_core.agent.engine import Engine, EpisodeCache, FinishReason, Generation, Request
from dgpo_core.agent.episode import Episode
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.agent.transformers_engine import TransformersEngine, _Row, preallocated_cache
from dgpo_core.config.agent import GREEDY, ProtocolConfig, RolloutConfig, Sampling
from dgpo_core.models import build_model
from tests.dgpo_core.agent.scripted import Answering, forward_logprobs, own_logprobs
from tests.dgpo_core.making import SHAPE, padded, question, tiny_model

WARM = Sampling(temperature=0.7)
NEVER = ("never written",)


def rollout_config(**changes: Any) -> RolloutConfig:
    return RolloutConfig.model_validate({"precision": "float32", **changes})


def prompts(count: int = 9, vocabulary: int = 300) -> list[Request]:
    """Requests of mixed lengths and limits."""
    rng = random.Random(4)
    return [
        Request([rng.randrange(vocabulary) for _ in range(rng.randint(1, 30))], rng.randint(1, 14), (i, 5))
        for i in range(count)
    ]


MakeEngine = Callable[..., TransformersEngine]


@pytest.fixture
def make_engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> MakeEngine:
    return lambda **changes: TransformersEngine(model, tokenizer, rollout_config(**changes))


@pytest.fixture
def engine(make_engine: MakeEngine) -> TransformersEngine:
    return make_engine()


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
        expected = own_logprobs(model, request, answer.token_ids, sampling)
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_samples_follow_the_distribution(engine: TransformersEngine, model: PreTrainedModel) -> None:
    """Each token is the inverse of the cumulative distribution at the request's next uniform number."""
    requests = prompts()
    for request, answer in zip(requests, engine.generate(requests, WARM, NEVER), strict=True):
        table = forward_logprobs(model, request, answer.token_ids, WARM).double().exp().numpy()
        uniforms = np.random.default_rng(request.seed).random(request.max_new_tokens)
        for probabilities, uniform, token in zip(table, uniforms, answer.token_ids, strict=False):
            cumulative = probabilities.cumsum()
            below = cumulative[token - 1] if token else 0.0
            assert below - 1e-5 <= uniform * cumulative[-1] <= cumulative[token] + 1e-5


@pytest.mark.parametrize("batch_tokens", [65_536, 120, 1])
def test_sampling_does_not_depend_on_the_batch(make_engine: MakeEngine, batch_tokens: int) -> None:
    engine = make_engine(batch_tokens=batch_tokens)
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


def test_batches_stay_in_the_limit(make_engine: MakeEngine) -> None:
    engine = make_engine(batch_tokens=100)
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
    assert [len(answer.token_ids) for answer in answers] == [7, 1]
    assert {answer.finish for answer in answers} == {FinishReason.LENGTH}


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
    engine = TransformersEngine(model, tokenizer, rollout_config())
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
    engine = TransformersEngine(model, tokenizer, rollout_config())
    answers = engine.generate([Request(tokenizer.encode(p), 12, (0,)) for p in ("C:", "E:")], GREEDY, NEVER)
    assert [answer.finish for answer in answers] == [FinishReason.EOS, FinishReason.LENGTH]


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
    found = TransformersEngine(wider, tokenizer, rollout_config()).generate(requests, sampling, NEVER)
    for own, other in zip(found, engine.generate(requests, sampling, NEVER), strict=True):
        assert (own.token_ids, own.finish) == (other.token_ids, other.finish)
        assert own.logprobs == pytest.approx(other.logprobs, abs=1e-5)


# what an engine keeps between the turns of an episode

EPISODES, TURNS = 12, 4


def conversation(
    engine: TransformersEngine, caches: list[EpisodeCache | None], sampling: Sampling = WARM
) -> list[list[Generation]]:
    """Turns of episodes with prompts, limits and environment's texts of mixed lengths; each turn continues
    what the last one wrote."""
    rng = random.Random(3)

    def words(longest: int) -> list[int]:
        return [rng.randrange(300) for _ in range(rng.randint(1, longest))]

    histories = [words(30) for _ in caches]
    turns = []
    for turn in range(TURNS):
        asked = [
            Request(list(history), rng.randint(1, 14), (i, turn), cache)
            for i, (history, cache) in enumerate(zip(histories, caches, strict=True))
        ]
        turns.append(engine.generate(asked, sampling, NEVER))
        for history, answer in zip(histories, turns[-1], strict=True):
            history += answer.token_ids + words(20)
    return turns


@contextmanager
def tokens_read(model: PreTrainedModel) -> Iterator[list[int]]:
    """Rows times columns of each pass through the model."""
    read: list[int] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        read.append(kwargs["input_ids"].numel())

    hook = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield read
    finally:
        hook.remove()


def same(first: list[list[Generation]], second: list[list[Generation]]) -> None:
    for one, other in zip(chain(*first), chain(*second), strict=True):
        assert (one.token_ids, one.finish) == (other.token_ids, other.finish)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
@pytest.mark.parametrize("limits", [{}, {"batch_tokens": 200}, {"kept_tokens": 150}, {"batch_tokens": 1}])
def test_same_tokens_as_without(make_engine: MakeEngine, limits: dict[str, int], sampling: Sampling) -> None:
    engine = make_engine(**limits)
    some = [EpisodeCache() if i % 3 else None for i in range(EPISODES)]
    alone = conversation(engine, [None] * EPISODES, sampling)
    same(conversation(engine, some, sampling), alone)
    same(conversation(engine, [EpisodeCache() for _ in range(EPISODES)], sampling), alone)


@pytest.mark.parametrize("limits", [{"batch_tokens": 200}, {"batch_tokens": 100, "kept_tokens": 150}])
def test_threads_change_nothing(make_engine: MakeEngine, limits: dict[str, int]) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            caches = [EpisodeCache() for _ in range(EPISODES)]
            turns = conversation(make_engine(**limits), [*caches], WARM)
            found.append((turns, [cache.content and cache.content.ids for cache in caches]))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_only_new_tokens_are_read(engine: TransformersEngine, model: PreTrainedModel) -> None:
    cache = EpisodeCache()
    (first,) = engine.generate([Request(list(range(20, 60)), 5, (0,), cache)], GREEDY, NEVER)
    history = [*range(20, 60), *first.token_ids, 7, 8, 9]
    with tokens_read(model) as read:
        engine.generate([Request(history, 2, (1,), cache)], GREEDY, NEVER)
    # the last token that was sampled had not been read, three are new; then one for the second sample
    assert read == [1 + 3, 1]


def test_what_belongs_to_another_history_is_not_used(engine: TransformersEngine) -> None:
    cache = EpisodeCache()
    engine.generate([Request([1, 2, 3, 4], 6, (0,), cache)], GREEDY, NEVER)
    for other in ([1, 2, 9, 4, 5, 6, 7, 8, 9, 10, 11, 12], [1, 2]):
        kept = cache.content
        found = engine.generate([Request(other, 6, (1,), cache)], WARM, NEVER)
        assert found == engine.generate([Request(other, 6, (1,))], WARM, NEVER)
        assert cache.content.ids == [*other, *found[0].token_ids[:-1]]
        cache.content = kept


@pytest.mark.parametrize("batch_tokens", [100, 65_536])
@pytest.mark.parametrize(("limit", "counts"), [(0, {0}), (100, {1, 2, 3}), (10_000, {EPISODES})])
def test_no_more_is_kept_than_allowed(
    make_engine: MakeEngine, model: PreTrainedModel, limit: int, counts: set[int], batch_tokens: int
) -> None:
    """At no moment: a turn's first batches are done while later ones still have what the last turn left."""
    engine = make_engine(kept_tokens=limit, batch_tokens=batch_tokens)
    caches = [EpisodeCache() for _ in range(EPISODES)]
    held: list[int] = []

    def note(*_: Any) -> None:
        held.append(sum(len(cache.content.ids) for cache in caches if cache.content))

    hook = model.base_model.register_forward_hook(note)
    try:
        conversation(engine, [*caches])
    finally:
        hook.remove()
    assert max(held) <= limit
    kept = [cache.content for cache in caches if cache.content]
    assert len(kept) in counts
    assert sum(len(one.ids) for one in kept) <= limit
    for one in kept:
        assert {keys.shape[1] for keys, _ in one.states} == {len(one.ids)}


class Remembering:
    """An engine; `caches` are those that it was given, in the order of the requests."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.caches: list[EpisodeCache] = []
        self.kept: list[bool] = []

    def generate(
        self, requests: list[Request], sampling: Sampling, stop: tuple[str, ...]
    ) -> list[Generation]:
        answers = self._engine.generate(requests, sampling, stop)
        given = [request.cache for request in requests if request.cache]
        self.caches += given
        self.kept += [cache.content is not None for cache in given]
        return answers


def episodes(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> list[Episode]:
    config = ProtocolConfig(max_new_tokens=12, instruction="short")
    loop = AgentLoop(engine, tokenizer, Answering(), config, 3)
    return loop.run([Task(question(), "onehop", seed=(i,)) for i in range(5)], Sampling())


def test_a_run_with_new_weights_uses_nothing_of_an_older_one(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer)
    engine = TransformersEngine(model, tokenizer, rollout_config())
    first, second = Remembering(engine), Remembering(engine)
    before = episodes(first, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = episodes(second, tokenizer)
    assert not {*map(id, first.caches)} & {*map(id, second.caches)}
    fresh = episodes(TransformersEngine(model, tokenizer, rollout_config(kept_tokens=0)), tokenizer)
    assert [e.token_ids for e in after] == [e.token_ids for e in fresh]
    assert [e.token_ids for e in after] != [e.token_ids for e in before]
    assert max(e.generations for e in after) > 1


def test_nothing_is_kept_for_a_turn_that_will_not_come(
    engine: TransformersEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    watched = Remembering(engine)
    config = ProtocolConfig(max_new_tokens=12, instruction="short", max_turns=2)
    loop = AgentLoop(watched, tokenizer, Answering(), config, 3)
    single = Task(question(), "onehop", seed=(0,), opening="<answer>", single_turn=True)
    loop.run([single], GREEDY)
    assert watched.kept == [False]
    (episode,) = loop.run([Task(question(), "onehop", seed=(1,))], GREEDY)
    assert episode.generations == 3 and watched.kept[1:] == [True, True, False]


def test_an_episode_reads_each_token_once(
    make_engine: MakeEngine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """But for the padding of the batch; without a cache the history is read again in each turn."""
    read = {}
    for limit in (0, 10_000):
        engine = make_engine(kept_tokens=limit)
        with tokens_read(model) as found:
            done = episodes(engine, tokenizer)
        read[limit] = sum(found)
        assert min(e.generations for e in done) > 2
    assert read[10_000] < 1.2 * sum(len(e.token_ids) for e in done) < 0.8 * read[0]


def test_bfloat16(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    engine, cache, history = make_engine(precision="bfloat16"), EpisodeCache(), [4, 5, 6]
    for turn in range(3):
        request = Request(list(history), 6, (turn,), cache)
        (answer,) = engine.generate([request], Sampling(), NEVER)
        expected = own_logprobs(model, request, answer.token_ids, Sampling())
        assert answer.logprobs == pytest.approx(expected, abs=0.3)
        history += [*answer.token_ids, 9, 10]
        keys, values = cache.content.states[0]
        assert (keys.dtype, values.dtype) == (torch.float32, torch.bfloat16)  # the planner counts 6 bytes
    assert cache.content.ids == history[:-3]


# the preallocated cache against transformers' own


def states(model: PreTrainedModel, cache: Any, ids: torch.Tensor, stay: list[int]) -> list[torch.Tensor]:
    """Hidden states of six tokens, then, of the rows that stay, of one and of two more."""
    found = []
    with torch.inference_mode():
        found.append(model.base_model(input_ids=ids[:, :6], past_key_values=cache).last_hidden_state)
        if len(stay) < len(ids):
            cache.batch_select_indices(torch.tensor(stay))
        parts = (ids[stay, 6:7], ids[stay, 7:])
        found += [model.base_model(input_ids=part, past_key_values=cache).last_hidden_state for part in parts]
    return found


@pytest.mark.parametrize("stay", [[0, 1, 2], [0, 2], [1]])
def test_same_states_as_dynamic_cache(model: PreTrainedModel, stay: list[int]) -> None:
    ids = torch.randint(100, (3, 9), generator=torch.Generator().manual_seed(0))
    first = states(model, preallocated_cache(model.config, 9), ids, stay)
    second = states(model, DynamicCache(config=model.config), ids, stay)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    whole = model.base_model(input_ids=ids[stay]).last_hidden_state[:, 7:]
    torch.testing.assert_close(first[-1], whole, rtol=1e-4, atol=1e-5)


def test_full_cache(model: PreTrainedModel) -> None:
    cache = preallocated_cache(model.config, 4)
    with torch.inference_mode(), pytest.raises(IndexError, match="room for 4 tokens, not for 5"):
        model.base_model(input_ids=torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)


def test_other_kinds_of_layers_are_refused() -> None:
    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ValueError, match="other kinds than full attention"):
        preallocated_cache(config, 4)
