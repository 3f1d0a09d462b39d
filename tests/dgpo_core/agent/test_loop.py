"""The agent loop, and collections in chunks, with an engine that writes given texts."""

import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgpo_core.agent import prompts
from dgpo_core.agent.engine import (
    EpisodeCache,
    FinishReason,
    Generation,
    GuidedEngine,
    Request,
)
from dgpo_core.agent.episode import Ending, Episode, Outcome, Owner
from dgpo_core.agent.loop import AgentLoop, Task, collect, em_of, stable_seed
from dgpo_core.config.agent import GREEDY, ProtocolConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError, NotFinite
from dgpo_core.retrieval.index import Index
from dgpo_core.retrieval.ranking import Retriever
from dgpo_core.world.pretraining import build_tokenizer
from tests.dgpo_core.agent.scripted import Answering, ScriptedEngine
from tests.dgpo_core.agent.scripts import (
    ANSWER,
    BABBLE,
    SEARCH,
    TOKENIZER,
    paris_or_rome,
    pieces,
    run_all,
    scripted,
    tasks,
)
from tests.dgpo_core.making import question, random_episode


def run(
    *turns: str,
    retriever: Retriever | None = None,
    config: ProtocolConfig | None = None,
    opening: str = "",
    golden: tuple[str, ...] = ("Paris",),
) -> tuple[Episode, ScriptedEngine]:
    """One episode; the last text is written again and again."""
    engine = ScriptedEngine(TOKENIZER, lambda _, turn: turns[min(turn, len(turns) - 1)])
    loop = AgentLoop(engine, TOKENIZER, retriever or Answering(), config or ProtocolConfig(), 3)
    (episode,) = loop.run([Task(question(answers=golden), "onehop", opening=opening)], GREEDY)
    return episode, engine


def result(episode: Episode) -> tuple[str | None, Outcome, Ending]:
    return episode.prediction, episode.outcome, episode.ending


def environment_ids(episode: Episode) -> list[int]:
    return [
        t for t, owner in zip(episode.token_ids, episode.owners, strict=True) if owner == Owner.ENVIRONMENT
    ]


def test_search_then_answer() -> None:
    episode, engine = run(SEARCH, ANSWER)
    prompt = prompts.prompt_text("Where was Ada born", "paper", TOKENIZER)
    information = "\n\n<information>Doc 1(Title: Ada) Ada was born in Paris.\n</information>\n\n"
    assert pieces(episode) == [
        (Owner.PROMPT, prompt),
        (Owner.MODEL, SEARCH),
        (Owner.ENVIRONMENT, information),
        (Owner.MODEL, ANSWER),
    ]
    assert episode.response == SEARCH + information + ANSWER
    assert result(episode) == ("Paris", Outcome.CORRECT, Ending.ANSWERED)
    assert (episode.generations, episode.invalid_actions, episode.cut_turns) == (2, 0, 0)
    assert episode.well_formed
    assert episode.hit
    (search,) = episode.searches
    assert (search.query, search.passage_ids, search.scores) == ("birthplace of Ada", ["7"], [9.0])
    named = episode.question_id, episode.dataset, episode.question, episode.golden_answers
    assert named == ("q0", "onehop", "Where was Ada born", ["Paris"])
    assert [request.seed for request in engine.requests] == [(0, 0), (0, 1)]
    second = engine.requests[1].token_ids
    assert second == episode.token_ids[: len(second)]
    assert TOKENIZER.decode(second) == prompt + SEARCH + information


def test_budget_is_four_answered_searches_and_five_generations() -> None:
    retriever = Answering()
    episode, engine = run(SEARCH, retriever=retriever)
    assert (len(engine.requests), episode.generations, len(episode.searches)) == (5, 5, 4)
    assert len(retriever.queries) == 4
    assert (episode.ending, episode.outcome, episode.prediction) == (Ending.BUDGET, Outcome.WRONG, None)
    assert [owner for owner, _ in pieces(episode)].count(Owner.ENVIRONMENT) == 4
    assert episode.owners[-1] == Owner.MODEL
    assert not episode.well_formed
    last, _ = run(SEARCH, SEARCH, SEARCH, SEARCH, ANSWER)
    assert (last.outcome, last.ending, last.generations) == (Outcome.CORRECT, Ending.ANSWERED, 5)


def test_invalid_actions_are_told_and_use_up_turns() -> None:
    episode, engine = run(BABBLE)
    assert len(engine.requests) == 5
    assert (episode.invalid_actions, len(episode.searches), episode.ending) == (5, 0, Ending.BUDGET)
    environment = [text for owner, text in pieces(episode) if owner == Owner.ENVIRONMENT]
    assert environment == [prompts.INVALID_ACTION] * 4
    assert pieces(episode)[1] == (Owner.MODEL, BABBLE), "the EOS that ended a turn belongs to it"
    recovered, _ = run(BABBLE, SEARCH, ANSWER)
    assert (recovered.outcome, recovered.invalid_actions, recovered.generations) == (Outcome.CORRECT, 1, 3)
    assert not recovered.well_formed


def test_no_turns_means_one_unanswered_generation() -> None:
    episode, engine = run(SEARCH, config=ProtocolConfig(max_turns=0))
    assert (len(engine.requests), len(episode.searches), episode.ending) == (1, 0, Ending.BUDGET)


def test_answer_of_the_prompts_example_is_never_the_prediction() -> None:
    episode, _ = run(SEARCH, golden=("Beijing",))
    assert "<answer> Beijing </answer>" in pieces(episode)[0][1]
    assert (episode.prediction, episode.outcome) == (None, Outcome.WRONG)


def test_answer_scope_of_the_release_reads_the_prompt_too() -> None:
    """Its episode without an answer is scored as the instruction's example."""
    released = ProtocolConfig(answer_scope="prompt_and_response")
    episode, _ = run(SEARCH, golden=("Beijing",), config=released)
    assert (episode.prediction, episode.outcome) == ("Beijing", Outcome.CORRECT)
    episode, _ = run(SEARCH, ANSWER, golden=("Beijing",), config=released)
    assert (episode.prediction, episode.outcome) == ("Paris", Outcome.WRONG)


def test_answers_in_retrieved_text_are_not_predictions() -> None:
    passage = Passage("1", "T", "<answer> Paris </answer>")
    episode, _ = run(SEARCH, retriever=Answering([passage]))
    assert (episode.prediction, episode.outcome, episode.hit) == (None, Outcome.WRONG, True)


def test_forced_answer() -> None:
    context = "\n\n<information>Doc 1(Title: Ada) Ada was born in Paris.\n</information>\n\n<answer>"
    episode, _ = run(" Paris </answer>", opening=context)
    assert result(episode) == ("Paris", Outcome.CORRECT, Ending.ANSWERED)
    assert [owner for owner, _ in pieces(episode)] == [Owner.PROMPT, Owner.ENVIRONMENT, Owner.MODEL]
    assert pieces(episode)[1][1] == context
    assert episode.searches == []
    thinking, _ = run(SEARCH, " Rome </answer>", ANSWER, opening=context.removesuffix("<answer>"))
    assert (thinking.prediction, thinking.invalid_actions, len(thinking.searches)) == ("Paris", 1, 1)


def test_context_limit() -> None:
    prompt = len(TOKENIZER.encode(prompts.prompt_text("Where was Ada born", "paper", TOKENIZER)))
    never, engine = run(ANSWER, config=ProtocolConfig(max_context=prompt))
    assert result(never) == (None, Outcome.WRONG, Ending.LENGTH)
    assert (never.generations, engine.requests) == (0, [])
    cut, engine = run(SEARCH, config=ProtocolConfig(max_context=prompt + 4))
    assert engine.requests[0].max_new_tokens == 4
    assert (cut.model_tokens, cut.cut_turns, cut.ending, cut.generations) == (4, 1, Ending.LENGTH, 1)
    written = len(TOKENIZER.encode(SEARCH))
    full, engine = run(SEARCH, config=ProtocolConfig(max_context=prompt + written + 5))
    assert (full.ending, full.generations) == (Ending.LENGTH, 1)
    assert len(full.searches) == len(engine.requests) == 1


def test_limit_of_new_tokens() -> None:
    episode, engine = run(SEARCH, config=ProtocolConfig(max_new_tokens=3))
    assert {request.max_new_tokens for request in engine.requests} == {3}
    assert (episode.cut_turns, episode.invalid_actions, episode.model_tokens) == (5, 5, 15)


WORDS = st.lists(
    st.sampled_from(["red", "house", "Ada", "was", "born", "1942", "\n", "x-y"]), max_size=40
).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.integers(1, 120))
def test_information_is_cut_but_never_its_tags(texts: list[tuple[str, str]], limit: int) -> None:
    passages = [Passage(str(i), title, text) for i, (title, text) in enumerate(texts)]
    episode, _ = run(
        SEARCH, ANSWER, retriever=Answering(passages), config=ProtocolConfig(max_information=limit)
    )
    whole = "".join(prompts.document(i, p.title, p.text) for i, p in enumerate(passages, 1))
    ids = environment_ids(episode)
    before, after = TOKENIZER.encode("\n\n<information>"), TOKENIZER.encode("</information>\n\n")
    assert ids[: len(before)] == before
    assert ids[-len(after) :] == after
    shown = ids[len(before) : -len(after)]
    assert len(shown) <= limit
    text = str(TOKENIZER.decode(shown))
    if len(TOKENIZER.encode(whole)) <= limit:
        assert shown == TOKENIZER.encode(whole)
    else:
        assert not text or (text.endswith("\n") and whole.startswith(text[:-1]))
        # no less is shown than can be: a cut passage fills the room, or not even its title has a place
        blocks = [prompts.document(i, p.title, p.text) for i, p in enumerate(passages, 1)]
        fitting = [TOKENIZER.encode("".join(blocks[:i])) for i in range(len(blocks))]
        full = [ids for ids in fitting if len(ids) <= limit][-1]
        number = fitting.index(full)
        head = TOKENIZER.encode(prompts.document(number + 1, passages[number].title, "").rstrip("\n"))
        cut = len(full) + len(head) + 1 < limit
        assert len(shown) == limit if cut else shown == full
    assert episode.outcome is Outcome.CORRECT
    assert episode.searches[0].passage_ids == [p.id for p in passages]


RELEASE = ProtocolConfig(documents="release")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.integers(1, 120))
def test_information_of_the_release_is_one_text(texts: list[tuple[str, str]], limit: int) -> None:
    """Tokenised whole, as there; cut anywhere, but never its closing tag."""
    passages = [Passage(str(i), title, text) for i, (title, text) in enumerate(texts)]
    config = RELEASE.model_copy(update={"max_information": limit})
    episode, _ = run(SEARCH, ANSWER, retriever=Answering(passages), config=config)
    ids = environment_ids(episode)
    whole = TOKENIZER.encode(prompts.information([(p.title, p.text) for p in passages], "release"))
    before, after = TOKENIZER.encode("\n\n<information>"), TOKENIZER.encode("</information>\n\n")
    if len(whole) <= len(before) + limit + len(after):
        assert ids == whole
    else:
        assert ids == whole[: len(before) + limit] + after
    assert episode.outcome is Outcome.CORRECT


@pytest.mark.parametrize("golden", ["A", "", "?", "Paris"])
@pytest.mark.parametrize("nothing", ["", " ", "\n\t", "\u200b"])
def test_an_answer_of_white_space_is_an_invalid_action_and_never_correct(golden: str, nothing: str) -> None:
    episode, _ = run(f"<answer>{nothing}</answer>", golden=(golden,))
    assert (episode.invalid_actions, episode.prediction, episode.outcome) == (5, None, Outcome.WRONG)


@pytest.mark.parametrize("documents", ["plain", "release"])
def test_of_a_long_passage_no_more_is_tokenised_than_is_shown(
    documents: Literal["plain", "release"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens as of the whole passage, which would take seconds."""
    read: list[int] = []
    tokenizer = build_tokenizer()
    encode = tokenizer.encode

    def counted(text: str, **options: Any) -> Any:
        read.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", counted)
    sentence = "Bel is the mayor of Ula, and Ula lies on the river Aro. "
    config = ProtocolConfig(max_information=320, documents=documents)
    shown = []
    for times in (60, 20_000):
        retriever = Answering([Passage("1", "A log", "Short."), Passage("2", "Log", sentence * times)])
        engine = ScriptedEngine(tokenizer, lambda _, turn: [SEARCH, ANSWER][turn])
        loop = AgentLoop(engine, tokenizer, retriever, config, 3)
        read.clear()
        (episode,) = loop.run([Task(question(answers=("Aro",)), "onehop")], GREEDY)
        assert episode.hit
        shown.append(pieces(episode)[2][1])
    assert shown[0] == shown[1]
    assert "Short.\nDoc 2(Title: " in shown[0]
    assert 700 < len(shown[0]) < sum(read) < 20_000


TURNS = st.lists(
    st.sampled_from(
        [SEARCH, ANSWER, BABBLE, "<search> </search>", "<answer> Rome </answer>", "x" * 30, "<|im_end|>"]
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(TURNS, min_size=1, max_size=5), st.integers(0, 5), st.integers(150, 420), st.integers(2, 30))
def test_owners_line_up_with_ids(scripts: list[list[str]], turns: int, context: int, new: int) -> None:
    engine, limits = scripted(scripts), {"max_turns": turns, "max_context": context, "max_new_tokens": new}
    episodes = run_all(engine, Answering(), range(len(scripts)), **limits)
    assert [episode.question_id for episode in episodes] == [f"q{i}" for i in range(len(scripts))]
    for i, episode in enumerate(episodes):
        assert len(episode.token_ids) == len(episode.owners) == len(episode.logprobs)
        own = [request for request in engine.requests if request.seed[0] == i]
        assert episode.generations == len(own) <= turns + 1
        # what the model wrote, where its requests end, is the model's, with its log-probabilities
        marked = set()
        for request in own:
            assert len(request.token_ids) + request.max_new_tokens <= context
            answer = engine.answer(request, ("</search>", "</answer>"))
            start = len(request.token_ids)
            assert episode.token_ids[: start + len(answer.token_ids)] == request.token_ids + answer.token_ids
            marked |= set(range(start, start + len(answer.token_ids)))
        assert marked == {t for t, owner in enumerate(episode.owners) if owner == Owner.MODEL}
        assert marked == {t for t, logprob in enumerate(episode.logprobs) if logprob != 0}
        prompt = TOKENIZER.encode(prompts.prompt_text(question().question, "paper", TOKENIZER))
        assert episode.token_ids[: len(prompt)] == prompt
        assert [o for o in episode.owners if o == Owner.PROMPT] == [Owner.PROMPT] * len(prompt)
        assert len(episode.searches) <= turns
        assert episode.model_tokens == len(marked)


def test_episodes_alone_and_together_are_the_same(index: Index) -> None:
    scripts = [[SEARCH, ANSWER], [ANSWER], [SEARCH], [BABBLE, SEARCH, ANSWER]]
    rng = random.Random(0)

    def together(order: list[int]) -> dict[str, Episode]:
        return {e.question_id: e for e in run_all(scripted(scripts), index, order)}

    whole = together(rng.sample(range(4), 4))
    for i in range(4):
        assert together([i])[f"q{i}"] == whole[f"q{i}"]
    assert len(whole["q0"].searches[0].passage_ids) == 3


def test_failing_retriever_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=pauses.append))
    retriever = Answering(failures=99)
    right, failed = run_all(scripted([[ANSWER], [SEARCH]]), retriever, range(2))
    assert (right.outcome, right.failure) == (Outcome.CORRECT, None)
    assert result(failed) == (None, Outcome.FAILED, Ending.FAILURE)
    assert failed.failure == "the index is down"
    assert (failed.searches, failed.generations, retriever.calls) == ([], 1, 3)
    assert pauses == [0.5, 1.0]


def test_transient_failure_is_tried_again() -> None:
    retriever = Answering(failures=1)
    episode, _ = run(SEARCH, ANSWER, retriever=retriever)
    assert (episode.outcome, retriever.calls) == (Outcome.CORRECT, 2)


def test_hit_needs_a_golden_answer_in_a_passage() -> None:
    episode, _ = run(SEARCH, SEARCH, ANSWER, golden=("London",))
    assert not episode.hit
    assert [search.hit for search in episode.searches] == [False, False]
    other, _ = run(SEARCH, ANSWER, golden=("London", "the PARIS!"))
    assert other.hit


def test_short_instruction() -> None:
    episode, _ = run(ANSWER, config=ProtocolConfig(instruction="short"))
    assert "Search if you need to. Question: Where was Ada born?\n" in pieces(episode)[0][1]


def test_an_ended_episode_holds_no_cache() -> None:
    """Of two episodes one answers in its first turn: what the engine kept of it is gone in the second."""
    caches: list[EpisodeCache] = []
    held: list[list[bool]] = []

    class Keeping(ScriptedEngine):
        def answer(self, request: Request, stop: tuple[str, ...]) -> Generation:
            assert request.cache is not None
            if request.cache not in caches:
                caches.append(request.cache)
            held.append([cache.content is not None for cache in caches])
            request.cache.content = "something"
            return super().answer(request, stop)

    engine = Keeping(TOKENIZER, lambda seed, turn: ANSWER if seed == (0,) or turn == 2 else SEARCH)
    loop = AgentLoop(engine, TOKENIZER, Answering(), ProtocolConfig(), 3)
    loop.run(tasks(range(2)), GREEDY)
    assert held == [[False], [True, False], [False, True], [False, True]]
    loop.run(tasks(range(2)), GREEDY)
    assert len(caches) == 4  # a run of its own, with caches of its own


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_model_that_gives_no_numbers_is_no_wrong_answer(value: float) -> None:
    """Whichever engine samples for it: evaluated, it would have EM 0."""

    class Broken(ScriptedEngine):
        def answer(self, request: Request, stop: tuple[str, ...]) -> Generation:
            made = super().answer(request, stop)
            return replace(made, logprobs=[*made.logprobs[:-1], value])

    loop = AgentLoop(Broken(TOKENIZER, lambda *_: ANSWER), TOKENIZER, Answering(), ProtocolConfig(), 3)
    with pytest.raises(NotFinite, match="the log-probability of a sampled token is"):
        loop.run([Task(question(), "onehop")], GREEDY)


def test_more_tokens_than_were_asked_for_fail_the_episode() -> None:
    """Of a turn's limit, and of what is left of the context."""
    prompt = len(TOKENIZER.encode(prompts.prompt_text("Where was Ada born", "paper", TOKENIZER)))

    class Talkative(ScriptedEngine):
        more = 0

        def answer(self, request: Request, stop: tuple[str, ...]) -> Generation:
            count = request.max_new_tokens + self.more
            return Generation([5] * count, [-0.5] * count, FinishReason.LENGTH)

    for limits, room in (({"max_new_tokens": 3}, 3), ({"max_context": prompt + 4}, 4)):
        engine = Talkative(TOKENIZER, lambda *_: "")
        (whole,) = run_all(engine, Answering(), [0], max_turns=0, **limits)
        assert (whole.failure, whole.model_tokens) == (None, room)
        engine.more = 1
        (failed,) = run_all(engine, Answering(), [0], max_turns=0, **limits)
        told = f"the engine gave {room + 1} tokens and {room + 1} log-probabilities, of at most {room}"
        assert (failed.failure, failed.outcome, failed.model_tokens) == (told, Outcome.FAILED, 0)


class Chunks:
    """Collections of seven tasks, three at a time, resumed from `folder`."""

    def __init__(self, folder: Path, engine: ScriptedEngine) -> None:
        self.engine, self.folder = engine, folder
        self.seen: list[tuple[int, int, float]] = []

    def __call__(self, killed_at: int = 0) -> list[Episode]:
        def progress(done: int, total: int, em: float) -> None:
            self.seen.append((done, total, em))
            if done == killed_at:
                raise KeyboardInterrupt

        loop = AgentLoop(self.engine, TOKENIZER, Answering(), ProtocolConfig(), 3)
        return collect(loop, tasks(range(7)), GREEDY, 3, self.folder, progress)


def test_killed_collection_continues_with_the_same_episodes(tmp_path: Path) -> None:
    whole = Chunks(tmp_path / "a", ScriptedEngine(TOKENIZER, paris_or_rome))()
    assert [e.question_id for e in whole] == [f"q{i}" for i in range(7)]
    assert [e.correct for e in whole] == [False, True] * 3 + [False]
    with pytest.raises(KeyboardInterrupt):
        Chunks(tmp_path / "b", ScriptedEngine(TOKENIZER, paris_or_rome))(killed_at=6)
    resumed = Chunks(tmp_path / "b", ScriptedEngine(TOKENIZER, paris_or_rome))
    assert resumed() == whole
    assert len(resumed.engine.requests) == 1, "finished chunks ran again"
    assert resumed.seen == [(3, 7, 1 / 3), (6, 7, 0.5), (7, 7, 3 / 7)]
    assert not list((tmp_path / "b").glob("*.part"))


def test_what_is_down_stops_a_collection_that_continues_later(tmp_path: Path) -> None:
    class Down(ScriptedEngine):
        def answer(self, request: Request, stop: tuple[str, ...]) -> Generation:
            if len(self.requests) > 3:
                raise InfrastructureError(f"the engine is dead at {request.seed}")
            return super().answer(request, stop)

    with pytest.raises(InfrastructureError, match=r"all 3 episodes of a chunk failed: .* dead at \(3, 0\)$"):
        Chunks(tmp_path, Down(TOKENIZER, lambda *_: ANSWER))()
    resumed = Chunks(tmp_path, ScriptedEngine(TOKENIZER, lambda *_: ANSWER))
    assert all(episode.correct for episode in resumed())
    assert len(resumed.engine.requests) == 4


def test_failed_episodes_are_in_no_average() -> None:
    right, wrong = random_episode(1, correct=True), random_episode(2, correct=False)
    failed = replace(wrong, outcome=Outcome.FAILED)
    assert em_of([right, failed, failed]) == 1.0
    assert em_of([right, wrong, failed]) == 0.5


def test_of_failed_episodes_alone_there_is_no_average() -> None:
    assert math.isnan(em_of([replace(random_episode(1), outcome=Outcome.FAILED)]))


def test_a_chunk_with_a_failed_episode_is_tried_again(tmp_path: Path) -> None:
    class Flaky(ScriptedEngine):
        def answer(self, request: Request, stop: tuple[str, ...]) -> Generation:
            if request.seed[0] == 1:
                raise InfrastructureError("the engine is dead")
            return super().answer(request, stop)

    first = Chunks(tmp_path / "new" / "state", Flaky(TOKENIZER, lambda *_: ANSWER))()
    assert [episode.outcome is Outcome.FAILED for episode in first] == [False, True] + [False] * 5
    again = Chunks(tmp_path / "new" / "state", ScriptedEngine(TOKENIZER, lambda *_: ANSWER))
    assert all(episode.correct for episode in again())
    assert [request.seed[0] for request in again.engine.requests] == [0, 1, 2]


def test_stable_seeds_are_fixed_and_distinct() -> None:
    assert stable_seed(0, "onehop", "q1") == 4253676138
    assert len({stable_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert stable_seed(1, "1") != stable_seed("1", 1)


def test_a_teacher_writes_turns_of_the_students_episodes_as_likely_as_told() -> None:
    """Which turns they are depends on the seeds alone; outside of `intervening` none is the teacher's."""

    def always(text: str) -> ScriptedEngine:
        return ScriptedEngine(TOKENIZER, lambda _, turn: text if turn < 4 else ANSWER)

    def writers(intervention: float, numbers: Iterable[int]) -> list[list[str]]:
        engine = GuidedEngine(always("<search> student </search>"), always("<search> teacher </search>"))
        loop = AgentLoop(engine, TOKENIZER, Answering(), ProtocolConfig(), 3)
        with engine.intervening(intervention):
            found = loop.run(tasks(numbers), GREEDY)
        (after,) = loop.run(tasks([0]), GREEDY)
        assert {search.query for search in after.searches} == {"student"}
        return [[search.query for search in episode.searches] for episode in found]

    assert {*map(tuple, writers(0.0, range(5)))} == {("student",) * 4}
    assert {*map(tuple, writers(1.0, range(5)))} == {("teacher",) * 4}
    mixed = writers(0.3, range(200))
    share = sum(turn == "teacher" for turns in mixed for turn in turns) / 800
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 800)
    assert writers(0.3, range(150, 160)) == mixed[150:160]
    more = writers(0.6, range(200))  # who teaches at 0.3 teaches at 0.6
    both = [pair for turns in zip(mixed, more, strict=True) for pair in zip(*turns, strict=True)]
    assert ("teacher", "student") not in both and ("student", "teacher") in both
