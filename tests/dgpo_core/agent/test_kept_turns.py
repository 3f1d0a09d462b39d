"""Episodes of several turns: with what the engine keeps between them, and without (float32)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.engine import Engine, EpisodeCache, Generation, Request
from dgpo_core.agent.episode import Episode
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import GREEDY, ProtocolConfig, RolloutConfig, Sampling
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.making import question, tiny_model

WARM = Sampling(temperature=0.7)
NEVER = ("never written",)
EPISODES, TURNS = 12, 4


def rollout_config(**changes: Any) -> RolloutConfig:
    return RolloutConfig.model_validate({"precision": "float32", **changes})


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
def test_same_tokens_as_without(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    limits: dict[str, int],
    sampling: Sampling,
) -> None:
    engine = TransformersEngine(model, tokenizer, rollout_config(**limits))
    some = [EpisodeCache() if i % 3 else None for i in range(EPISODES)]
    alone = conversation(engine, [None] * EPISODES, sampling)
    same(conversation(engine, some, sampling), alone)
    same(conversation(engine, [EpisodeCache() for _ in range(EPISODES)], sampling), alone)


def test_only_new_tokens_are_read(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(model, tokenizer, rollout_config())
    cache = EpisodeCache()
    (first,) = engine.generate([Request(list(range(20, 60)), 5, (0,), cache)], GREEDY, NEVER)
    history = [*range(20, 60), *first.token_ids, 7, 8, 9]
    with tokens_read(model) as read:
        engine.generate([Request(history, 2, (1,), cache)], GREEDY, NEVER)
    # the last token that was sampled had not been read, three are new; then one for the second sample
    assert read == [1 + 3, 1]


def test_what_belongs_to_another_history_is_not_used(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = TransformersEngine(model, tokenizer, rollout_config())
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    limit: int,
    counts: set[int],
    batch_tokens: int,
) -> None:
    """At no moment: a turn's first batches are done while later ones still have what the last turn left."""
    engine = TransformersEngine(
        model, tokenizer, rollout_config(kept_tokens=limit, batch_tokens=batch_tokens)
    )
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = Remembering(TransformersEngine(model, tokenizer, rollout_config()))
    config = ProtocolConfig(max_new_tokens=12, instruction="short", max_turns=2)
    loop = AgentLoop(engine, tokenizer, Answering(), config, 3)
    single = Task(question(), "onehop", seed=(0,), opening="<answer>", single_turn=True)
    loop.run([single], GREEDY)
    assert engine.kept == [False]
    (episode,) = loop.run([Task(question(), "onehop", seed=(1,))], GREEDY)
    assert episode.generations == 3 and engine.kept[1:] == [True, True, False]


def test_an_episode_reads_each_token_once(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """But for the padding of the batch; without a cache the history is read again in each turn."""
    read = {}
    for limit in (0, 10_000):
        engine = TransformersEngine(model, tokenizer, rollout_config(kept_tokens=limit))
        with tokens_read(model) as found:
            done = episodes(engine, tokenizer)
        read[limit] = sum(found)
        assert min(e.generations for e in done) > 2
    assert read[10_000] < 1.2 * sum(len(e.token_ids) for e in done) < 0.8 * read[0]


def test_bfloat16_keeps_too(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine, cache, history = TransformersEngine(model, tokenizer, RolloutConfig()), EpisodeCache(), [4, 5, 6]
    for turn in range(3):
        (answer,) = engine.generate([Request(list(history), 6, (turn,), cache)], Sampling(), NEVER)
        with torch.inference_mode():
            logits = model(torch.tensor([history + answer.token_ids])).logits[0, len(history) - 1 : -1]
        expected = logits.float().log_softmax(-1)[torch.arange(len(answer.token_ids)), answer.token_ids]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=0.3)
        history += [*answer.token_ids, 9, 10]
        keys, values = cache.content.states[0]
        assert (keys.dtype, values.dtype) == (torch.float32, torch.bfloat16)  # the planner counts 6 bytes
    assert cache.content.ids == history[:-3]
