"""The default engine against transformers' own generation and plain forward passes (float32)."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from dgpo_core.agent.engine import (
    Engine,
    EpisodeCache,
    FinishReason,
    Generation,
    GuidedEngine,
    Request,
    Session,
    generate,
)
from dgpo_core.agent.episode import Episode
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.agent.transformers_engine import TransformersEngine, slot_cache
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
    answers = generate(engine, requests, GREEDY, NEVER)
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
    for request, answer in zip(requests, generate(engine, requests, sampling, NEVER), strict=True):
        expected = own_logprobs(model, request, answer.token_ids, sampling)
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_samples_follow_the_distribution(engine: TransformersEngine, model: PreTrainedModel) -> None:
    """Each token is the inverse of the cumulative distribution at the request's next uniform number."""
    requests = prompts()
    for request, answer in zip(requests, generate(engine, requests, WARM, NEVER), strict=True):
        table = forward_logprobs(model, request, answer.token_ids, WARM).double().exp().numpy()
        uniforms = np.random.default_rng(request.seed).random(request.max_new_tokens)
        for probabilities, uniform, token in zip(table, uniforms, answer.token_ids, strict=False):
            cumulative = probabilities.cumsum()
            below = cumulative[token - 1] if token else 0.0
            assert below - 1e-5 <= uniform * cumulative[-1] <= cumulative[token] + 1e-5


LIMITS = [{}, {"batch_tokens": 120}, {"slots": 5}, {"batch_tokens": 1}, {"slots": 1}]


@pytest.mark.parametrize("limits", LIMITS)
def test_sampling_does_not_depend_on_the_batch(make_engine: MakeEngine, limits: dict[str, int]) -> None:
    engine = make_engine(**limits)
    requests = prompts(12)
    together = generate(engine, requests, Sampling(), NEVER)
    backwards = generate(engine, requests[::-1], Sampling(), NEVER)[::-1]
    for request, first, second in zip(requests, together, backwards, strict=True):
        (alone,) = generate(engine, [request], Sampling(), NEVER)
        assert first.token_ids == second.token_ids == alone.token_ids
        assert first.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def finish(session: Session, requests: list[Request], sampling: Sampling) -> list[Generation]:
    """Let requests join a session, and wait for them."""
    session.add(requests, sampling)
    found: dict[int, Generation] = {}
    while len(found) < len(requests):
        for request, result in session.advance():
            assert isinstance(result, Generation)
            found[id(request)] = result
    return [found[id(request)] for request in requests]


def test_requests_join_and_leave_at_any_time(engine: TransformersEngine) -> None:
    """Whatever else is under way, and however it is sampled."""
    requests = prompts(12)
    ways = [GREEDY, Sampling(), WARM] * 4
    alone = [generate(engine, [r], way, NEVER)[0] for r, way in zip(requests, ways, strict=True)]
    session = engine.session(NEVER)
    found: dict[int, Generation | Exception] = {}
    for request, way in zip(requests, ways, strict=True):
        session.add([request], way)
        found |= {id(ended): result for ended, result in session.advance()}
    while len(found) < len(requests):
        found |= {id(ended): result for ended, result in session.advance()}
    for request, expected in zip(requests, alone, strict=True):
        result = found[id(request)]
        assert isinstance(result, Generation)
        assert (result.token_ids, result.finish) == (expected.token_ids, expected.finish)
        assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_who_listens_hears_every_token_and_may_end_its_own_request(engine: TransformersEngine) -> None:
    heard: list[int] = []

    def refuse(token: int) -> None:
        raise KeyError(token)

    requests = [replace(request, max_new_tokens=9) for request in prompts(4)]
    expected = generate(engine, requests, WARM, NEVER)
    session = engine.session(NEVER)
    listening, refusing = replace(requests[1], on_token=heard.append), replace(requests[2], on_token=refuse)
    session.add([requests[0], listening, refusing, requests[3]], WARM)
    results: dict[int, Generation | Exception] = {}
    while len(results) < 4:
        results |= {id(ended): result for ended, result in session.advance()}
    assert heard == expected[1].token_ids
    assert isinstance(results[id(refusing)], KeyError)
    for place in (0, 3):
        result = results[id(requests[place])]
        assert isinstance(result, Generation) and result.token_ids == expected[place].token_ids


def test_seeds_differ(engine: TransformersEngine) -> None:
    requests = [Request([1, 2, 3], 12, (seed,)) for seed in range(5)]
    answers = generate(engine, requests, Sampling(), NEVER)
    assert len({tuple(answer.token_ids) for answer in answers}) == 5


def test_passes_stay_in_the_limits(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    engine, requests = make_engine(batch_tokens=100, slots=7), prompts(30)
    with passes(model) as shapes:
        generate(engine, requests, Sampling(), NEVER)
    assert max(rows for rows, _ in shapes) == 7
    assert max(rows * columns for rows, columns in shapes) <= 100
    assert sum(columns > 1 for _, columns in shapes) < len(requests), "none is read alone"


def test_length_ends_a_generation(engine: TransformersEngine) -> None:
    answers = generate(engine, [Request([5, 6], 7, (0,)), Request([5], 1, (0,))], GREEDY, NEVER)
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
    answers = generate(engine, requests, GREEDY, ("</search>", "</answer>"))
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
    answers = generate(engine, [Request(tokenizer.encode(p), 12, (0,)) for p in ("C:", "E:")], GREEDY, NEVER)
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
    found = generate(TransformersEngine(wider, tokenizer, rollout_config()), requests, sampling, NEVER)
    for own, other in zip(found, generate(engine, requests, sampling, NEVER), strict=True):
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
    session = engine.session(NEVER)

    def words(longest: int) -> list[int]:
        return [rng.randrange(300) for _ in range(rng.randint(1, longest))]

    histories = [words(30) for _ in caches]
    turns = []
    for turn in range(TURNS):
        asked = [
            Request(list(history), rng.randint(1, 14), (i, turn), cache)
            for i, (history, cache) in enumerate(zip(histories, caches, strict=True))
        ]
        turns.append(finish(session, asked, sampling))
        for history, answer in zip(histories, turns[-1], strict=True):
            history += answer.token_ids + words(20)
    return turns


@contextmanager
def passes(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """Rows and columns of each pass through the model."""
    shapes: list[tuple[int, int]] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows, columns = kwargs["input_ids"].shape
        shapes.append((rows, columns))

    hook = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def same(first: list[list[Generation]], second: list[list[Generation]]) -> None:
    for one, other in zip(chain(*first), chain(*second), strict=True):
        assert (one.token_ids, one.finish) == (other.token_ids, other.finish)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
@pytest.mark.parametrize("limits", LIMITS)
def test_same_tokens_as_without(make_engine: MakeEngine, limits: dict[str, int], sampling: Sampling) -> None:
    engine = make_engine(**limits)
    some = [EpisodeCache() if i % 3 else None for i in range(EPISODES)]
    alone = conversation(engine, [None] * EPISODES, sampling)
    same(conversation(engine, [*some], sampling), alone)
    same(conversation(engine, [EpisodeCache() for _ in range(EPISODES)], sampling), alone)


def test_only_new_tokens_are_read(engine: TransformersEngine, model: PreTrainedModel) -> None:
    cache, session = EpisodeCache(), engine.session(NEVER)
    (first,) = finish(session, [Request(list(range(20, 60)), 5, (0,), cache)], GREEDY)
    history = [*range(20, 60), *first.token_ids, 7, 8, 9]
    with passes(model) as shapes:
        finish(session, [Request(history, 2, (1,), cache)], GREEDY)
    # the last token that was sampled had not been read, three are new; then one for the second sample
    assert shapes == [(1, 1 + 3), (1, 1)]


@pytest.mark.parametrize(("slots", "read"), [(2, 2), (1, 7)])
def test_who_joins_takes_a_kept_slot_only_where_none_is_free(
    make_engine: MakeEngine, model: PreTrainedModel, slots: int, read: int
) -> None:
    session, cache = make_engine(slots=slots).session(NEVER), EpisodeCache()
    (first,) = finish(session, [Request([1, 2, 3, 4], 2, (0,), cache)], GREEDY)
    finish(session, [Request([5, 6], 2, (1,))], GREEDY)  # while the first one searches
    with passes(model) as shapes:
        finish(session, [Request([1, 2, 3, 4, *first.token_ids, 7], 1, (2,), cache)], GREEDY)
    assert shapes == [(1, read)]


def test_a_long_history_beside_a_long_reply(engine: TransformersEngine) -> None:
    """Together they would not have room in a slot."""
    session, caches = engine.session(NEVER), [EpisodeCache(), EpisodeCache()]
    words = [random.Random(i).choices(range(300), k=240) for i in range(2)]
    firsts = [words[0], words[1][:10]]
    asked = [Request(list(ids), 4, (i, 0), caches[i]) for i, ids in enumerate(firsts)]
    for ids, answer in zip(firsts, finish(session, asked, GREEDY), strict=True):
        ids += answer.token_ids
    again = [
        Request([*firsts[0], 5, 6], 8, (0, 1), caches[0]),
        Request([*firsts[1], *words[1]], 2, (1, 1), caches[1]),
    ]
    plain = [replace(request, cache=None) for request in again]
    same([finish(session, again, WARM)], [generate(engine, plain, WARM, NEVER)])


def test_what_belongs_to_another_history_is_not_used(engine: TransformersEngine) -> None:
    for other in ([1, 2, 9, 4, 5, 6, 7, 8, 9, 10, 11, 12], [1, 2]):
        cache, session = EpisodeCache(), engine.session(NEVER)
        finish(session, [Request([1, 2, 3, 4], 6, (0,), cache)], GREEDY)
        found = finish(session, [Request(other, 6, (1,), cache)], WARM)
        assert found == generate(engine, [Request(other, 6, (1,))], WARM, NEVER)
        assert cache.content.ids == [*other, *found[0].token_ids[:-1]]


def test_nothing_is_kept_for_a_turn_that_will_not_come(engine: TransformersEngine) -> None:
    session = engine.session(NEVER)
    for renew in (True, False):
        cache = EpisodeCache(renew=renew)
        finish(session, [Request([1, 2, 3], 4, (0,), cache)], GREEDY)
        assert (cache.content is not None) == renew


def episodes(engine: Engine, tokenizer: PreTrainedTokenizerFast, count: int = 5) -> list[Episode]:
    config = ProtocolConfig(max_new_tokens=12, instruction="short")
    loop = AgentLoop(engine, tokenizer, Answering(), config, 3)
    return loop.run([Task(question(), "onehop", seed=(i,)) for i in range(count)], Sampling())


def test_a_run_with_new_weights_uses_nothing_of_an_older_one(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer)
    engine = TransformersEngine(model, tokenizer, rollout_config())
    before = episodes(engine, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = episodes(engine, tokenizer)
    fresh = episodes(TransformersEngine(model, tokenizer, rollout_config()), tokenizer)
    assert [e.token_ids for e in after] == [e.token_ids for e in fresh]
    assert [e.token_ids for e in after] != [e.token_ids for e in before]
    assert max(e.generations for e in after) > 1


@pytest.mark.parametrize("slots", [64, 3])
def test_turns_of_a_teacher_leave_what_is_cached_of_an_episode_right(
    make_engine: MakeEngine, tokenizer: PreTrainedTokenizerFast, slots: int
) -> None:
    """With the student as its own teacher the episodes are the student's."""
    engine = make_engine(slots=slots)
    guided = GuidedEngine(engine, engine)
    with guided.intervening(0.5):
        found = episodes(guided, tokenizer, 12)
    assert [e.token_ids for e in found] == [e.token_ids for e in episodes(engine, tokenizer, 12)]
    assert max(e.generations for e in found) > 2


@pytest.mark.parametrize("slots", [64, 3])
def test_threads_change_nothing(
    make_engine: MakeEngine, tokenizer: PreTrainedTokenizerFast, slots: int
) -> None:
    """Not one bit: what is computed together does not depend on their number."""
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(episodes(make_engine(slots=slots), tokenizer, 21))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert len({tuple(episode.token_ids) for episode in found[0]}) == 21


def test_an_episode_reads_each_token_once(
    engine: TransformersEngine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """But for the padding of the batch."""
    with passes(model) as shapes:
        done = episodes(engine, tokenizer)
    assert min(e.generations for e in done) > 2
    assert sum(rows * columns for rows, columns in shapes) < 1.2 * sum(len(e.token_ids) for e in done)


def test_bfloat16(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    session, cache = make_engine(precision="bfloat16").session(NEVER), EpisodeCache()
    history = [4, 5, 6]
    for turn in range(3):
        request = Request(list(history), 6, (turn,), cache)
        (answer,) = finish(session, [request], Sampling())
        expected = own_logprobs(model, request, answer.token_ids, Sampling())
        assert answer.logprobs == pytest.approx(expected, abs=0.3)
        history += [*answer.token_ids, 9, 10]
        layer = session._slots._layers[0]
        assert (layer.keys.dtype, layer.values.dtype) == (
            torch.float32,
            torch.bfloat16,
        )  # the planner: 6 bytes


def test_other_kinds_of_layers_are_refused() -> None:
    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ValueError, match="other kinds than full attention"):
        slot_cache(config)
