"""Episodes under way together: limits of their own, watchers, lanes, and searches beside generation."""

import threading
from dataclasses import replace

import pytest

from dgpo_core.agent import loop as loop_module
from dgpo_core.agent import prompts
from dgpo_core.agent.engine import FunctionSession, Generation, Request
from dgpo_core.agent.episode import Ending, Episode, Owner
from dgpo_core.agent.loop import AgentLoop
from dgpo_core.config.agent import GREEDY, ProtocolConfig, Sampling
from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.ranking import Hit
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


def test_a_task_may_have_limits_of_its_own() -> None:
    engine = scripted([[SEARCH, ANSWER], [SEARCH, ANSWER], [BABBLE, ANSWER]])
    plain, limited, single = tasks(range(3))
    limited = replace(limited, protocol=ProtocolConfig(max_turns=0, instruction="short"))
    single = replace(single, single_turn=True, sample=2)
    loop = AgentLoop(engine, TOKENIZER, Answering(), ProtocolConfig(), 3)
    found = loop.run([plain, limited, single], GREEDY)
    assert [(e.generations, e.ending) for e in found] == [
        (2, Ending.ANSWERED), (1, Ending.BUDGET), (1, Ending.BUDGET)
    ]  # fmt: skip
    assert [e.sample for e in found] == [0, 0, 2]
    assert pieces(found[1])[0][1] == prompts.prompt_text("Where was Ada born", "short", TOKENIZER)
    assert pieces(found[2])[1:] == [(Owner.MODEL, BABBLE)], "after the last turn nothing is told"


def test_only_before_its_last_turn_an_episodes_cache_is_renewed() -> None:
    renewed: list[bool] = []

    class Looking(ScriptedEngine):
        def answer(self, request: Request, stop: tuple[str, ...]) -> Generation:
            assert request.cache is not None
            renewed.append(request.cache.renew)
            return super().answer(request, stop)

    run_all(Looking(TOKENIZER, lambda *_: BABBLE), Answering(), [0], max_turns=2)
    assert renewed == [True, True, False]


def test_dealt_passages_take_the_retrievers_place() -> None:
    """In the order and at the search that they are dealt for; who has none asks the retriever."""
    retriever = Answering()
    asking, dealt = tasks(range(2))

    def deal(searches: int) -> list[Passage]:
        return [Passage(f"{searches}{letter}", "T", "Paris" if letter == "b" else "") for letter in "ab"]

    loop = AgentLoop(scripted([[SEARCH, ANSWER], [SEARCH, SEARCH, ANSWER]]), TOKENIZER, retriever,
                     ProtocolConfig(), 3)  # fmt: skip
    first, second = loop.run([asking, replace(dealt, deal=deal)], GREEDY)
    assert [search.passage_ids for search in first.searches] == [["7"]]
    assert [search.passage_ids for search in second.searches] == [["0a", "0b"], ["1a", "1b"]]
    assert [search.scores for search in second.searches] == [[1.0, 0.5]] * 2
    assert (second.hit, retriever.queries, retriever.calls) == (True, ["birthplace of Ada"], 1)


class Diary:
    """A watcher that notes what it is told, and raises at `end`."""

    def __init__(self, end: str = "") -> None:
        self.notes: list[str] = []
        self._end = end

    def _note(self, note: str) -> None:
        self.notes.append(note)
        if note == self._end:
            raise ValueError(f"no more after {note}")

    def begin_turn(self) -> None:
        self._note("turn")

    def token(self, token: int) -> None:
        self._note(str(token))

    def end_turn(self) -> None:
        self._note("end")

    def search(self, query: str, hits: list[Hit]) -> None:
        self._note(f"{query}: {[hit.passage.id for hit in hits]}")


class Telling(ScriptedEngine):
    """Tells of each token; what the listener raises ends the request."""

    def session(self, stop: tuple[str, ...]) -> FunctionSession:
        class Session(FunctionSession):
            def _result(self, request: Request) -> Generation | Exception:
                try:
                    return self._answer(request)
                except ValueError as error:
                    return error

        def answer(request: Request) -> Generation:
            self.requests.append(request)
            made = self.answer(request, stop)
            if request.on_token is not None:
                for token in made.token_ids:
                    request.on_token(token)
            return made

        return Session(answer)


def watched(diary: Diary) -> tuple[dict[str, Episode | Exception], Telling]:
    """Two episodes side by side, of which the diary watches the first."""
    engine = Telling(TOKENIZER, lambda _, turn: [SEARCH, ANSWER][turn])
    loop = AgentLoop(engine, TOKENIZER, Answering(), ProtocolConfig(), 3)
    first, second = tasks(range(2))
    found: dict[str, Episode | Exception] = {}
    with loop.start() as running:
        running.add([replace(first, watcher=diary), second], GREEDY)
        while running.count:
            found |= {task.question.id: result for task, result in running.advance()}
    return found, engine


def test_a_watcher_is_told_of_everything_in_order() -> None:
    diary = Diary()
    found, _ = watched(diary)
    assert isinstance(found["q0"], Episode) and isinstance(found["q1"], Episode)
    written = [[str(i) for i in TOKENIZER.encode(text)] for text in (SEARCH, ANSWER)]
    searched = "birthplace of Ada: ['7']"
    assert diary.notes == ["turn", *written[0], "end", searched, "turn", *written[1], "end"]
    assert found["q0"].token_ids == found["q1"].token_ids, "who is watched is not disturbed"


FIRST_TOKEN = str(TOKENIZER.encode(SEARCH)[0])


@pytest.mark.parametrize(
    ("end", "turns"), [("turn", 0), (FIRST_TOKEN, 1), ("end", 1), ("birthplace of Ada: ['7']", 1)]
)
def test_what_a_watcher_raises_ends_its_episode_alone(end: str, turns: int) -> None:
    diary = Diary(end)
    found, engine = watched(diary)
    assert str(found["q0"]) == f"no more after {end}"
    assert diary.notes[-1] == end and diary.notes.count(end) == 1, "then it is told of nothing more"
    assert isinstance(found["q1"], Episode) and found["q1"].correct
    assert [request.seed[0] for request in engine.requests].count(0) == turns


@pytest.mark.parametrize(
    ("episodes", "lanes"), [(1, [1]), (15, [15]), (16, [4] * 4), (17, [3] * 5 + [2]), (40, [4] * 10)]
)
def test_episodes_are_dealt_evenly_into_lanes(episodes: int, lanes: list[int]) -> None:
    """An even number of sessions of four at most, unless they are few; results are in order."""
    sessions: list[set[int]] = []

    class Laned(ScriptedEngine):
        lane = 4

        def session(self, stop: tuple[str, ...]) -> FunctionSession:
            own: set[int] = set()
            sessions.append(own)

            def answer(request: Request) -> Generation:
                own.add(request.seed[0])
                return self.answer(request, stop)

            return FunctionSession(answer)

    found = run_all(Laned(TOKENIZER, paris_or_rome), Answering(), range(episodes))
    assert sorted(map(len, sessions), reverse=True) == lanes
    assert [episode.question_id for episode in found] == [f"q{i}" for i in range(episodes)]
    assert [episode.correct for episode in found] == [i % 2 == 1 for i in range(episodes)]


def test_a_session_gets_the_samplings_and_is_closed() -> None:
    seen: list[object] = []

    class Session(FunctionSession):
        def add(self, requests: list[Request], sampling: Sampling) -> None:
            seen.append(sampling)
            super().add(requests, sampling)

        def close(self) -> None:
            seen.append("closed")

    class Recording(ScriptedEngine):
        def session(self, stop: tuple[str, ...]) -> FunctionSession:
            seen.append(stop)
            return Session(lambda request: self.answer(request, stop))

    warm = Sampling(temperature=0.7)
    loop = AgentLoop(Recording(TOKENIZER, lambda *_: ANSWER), TOKENIZER, Answering(), ProtocolConfig(), 3)
    with loop.start() as running:
        running.add(tasks([0]), GREEDY)
        running.add(tasks([1]), warm)
        while running.count:
            running.advance()
    assert seen == [("</search>", "</answer>"), GREEDY, warm, "closed"]


class Waiting(Answering):
    """Answers when it may; notes which queries came together."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()
        self.batches: list[list[str]] = []

    def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        self.batches.append(queries)
        assert self.may.wait(10), "nobody let it answer"
        return super().search(queries, top_k)


def searches_once(seed: tuple[int, ...], turn: int) -> str:
    """What each episode writes but the one with seed 0, which only babbles."""
    if seed == (0,):
        return BABBLE
    return ANSWER if turn else f"<search> {seed[0]} </search>"


def test_nobody_waits_for_anothers_search() -> None:
    """One searches; meanwhile another goes on to its end. Two who join are answered together, afterwards."""
    retriever = Waiting()
    engine = ScriptedEngine(TOKENIZER, searches_once)
    loop = AgentLoop(engine, TOKENIZER, retriever, ProtocolConfig(max_turns=1), 3)
    with loop.start(paced=False) as running:
        running.add(tasks([1, 0]), GREEDY)
        assert running.count == 2
        assert running.advance() == [] and running.count == 2  # 1 asks, 0 was told that it did not
        running.add(tasks([2, 3]), GREEDY)
        ((task, ended),) = running.advance()
        assert (task.question.id, running.count) == ("q0", 3)
        assert isinstance(ended, Episode) and ended.ending is Ending.BUDGET
        assert running.advance() == [] and running.count == 3, "all wait, two for another's search"
        retriever.may.set()
        late: list[str] = []
        while running.count:
            late += [task.question.id for task, _ in running.advance()]
    assert late == ["q1", "q2", "q3"]
    assert retriever.batches == [["1"], ["2", "3"]]


def test_who_writes_does_not_wait_for_a_search_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even `PAUSE`: here the search is answered after the other's third turn alone."""
    monkeypatch.setattr(loop_module, "PAUSE", 60.0)
    retriever = Waiting()

    def script(seed: tuple[int, ...], turn: int) -> str:
        if seed == (0,) and turn == 2:
            retriever.may.set()
        return searches_once(seed, turn)

    loop = AgentLoop(ScriptedEngine(TOKENIZER, script), TOKENIZER, retriever, ProtocolConfig(), 3)
    with loop.start(paced=False) as running:
        running.add(tasks([1, 0]), GREEDY)
        found: dict[str, Episode | Exception] = {}
        while running.count:
            found |= {task.question.id: result for task, result in running.advance()}
    assert isinstance(found["q1"], Episode) and found["q1"].correct


def test_a_paced_search_is_waited_for_at_the_next_advance() -> None:
    """However long it takes, the episode goes on at the same place."""
    retriever = Waiting()
    engine = ScriptedEngine(TOKENIZER, searches_once)
    loop = AgentLoop(engine, TOKENIZER, retriever, ProtocolConfig(max_turns=3), 3)
    with loop.start() as running:
        running.add(tasks([1, 0]), GREEDY)
        running.advance()
        threading.Timer(0.2, retriever.may.set).start()
        running.advance()
        ((task, _),) = running.advance()
        assert (task.question.id, running.count) == ("q1", 1)


def test_a_fault_of_the_program_is_no_failed_episode() -> None:
    class Broken(Answering):
        def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
            raise ZeroDivisionError("a fault")

    with pytest.raises(ZeroDivisionError, match="a fault"):
        run_all(scripted([[SEARCH]]), Broken(), [0])
