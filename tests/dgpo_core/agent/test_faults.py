"""Whatever fails, no episode is lost, and none counts as wrong that has no answer to count."""

import httpx
import pytest
from tenacity import wait_none

from dgpo_core.agent.episode import Episode, Outcome
from dgpo_core.agent.loop import AgentLoop, Task, em_of
from dgpo_core.config.agent import GREEDY, ProtocolConfig
from dgpo_core.errors import NotFinite
from dgpo_core.retrieval import client as client_module
from dgpo_core.retrieval.client import ServiceClient, describe_service
from dgpo_core.retrieval.index import Index
from dgpo_core.world.pretraining import build_tokenizer
from tests.dgpo_core.agent.faulty import (
    ENGINE_FAULTS,
    HARMLESS,
    SERVICE_FAULTS,
    FaultyEngine,
    faulty_service,
)
from tests.dgpo_core.agent.scripted import Answering, ScriptedEngine
from tests.dgpo_core.making import question

TOKENIZER = build_tokenizer()
COUNT = 6


def script(seed: tuple[int, ...], turn: int) -> str:
    """Every third question is answered at once, the others after a search; the even answers are right."""
    if seed[0] % 3 and turn == 0:
        return f"<search> Ada {seed[0]} </search>"
    return f"<answer> {'Rome' if seed[0] % 2 else 'Paris'} </answer>"


def run(engine: ScriptedEngine, retriever: Index | Answering) -> list[Episode]:
    tasks = [Task(question(name=f"q{i}"), "onehop", seed=(i,)) for i in range(COUNT)]
    return AgentLoop(engine, TOKENIZER, retriever, ProtocolConfig(), 3).run(tasks, GREEDY)


def searched(url: str) -> list[Episode]:
    """The episodes, with what the service at `url` finds."""
    about = describe_service(url)
    return run(ScriptedEngine(TOKENIZER, script), Index("d", ServiceClient(url, about.digest)))


@pytest.fixture(scope="module")
def healthy() -> list[Episode]:
    with faulty_service(None) as url:
        return searched(url)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LONGEST_WAIT", 0.001)
    monkeypatch.setattr(client_module, "TIMEOUT", httpx.Timeout(5.0, read=0.4))
    monkeypatch.setattr("dgpo_core.agent.loop.wait_exponential", lambda multiplier: wait_none())


def check(episodes: list[Episode], healthy: list[Episode], lost: set[int]) -> None:
    """Those of `lost` have failed; the others are to the bit what they are without a fault."""
    assert [episode.question_id for episode in episodes] == [f"q{i}" for i in range(COUNT)]
    for i, (episode, whole) in enumerate(zip(episodes, healthy, strict=True)):
        if i in lost:
            assert episode.outcome is Outcome.FAILED and episode.failure and not episode.correct
            assert len(episode.token_ids) == len(episode.owners) == len(episode.logprobs)
        else:
            assert episode == whole
    answered = [whole.correct for i, whole in enumerate(healthy) if i not in lost]
    assert em_of(episodes) == sum(answered) / len(answered)


SEARCHING = {i for i in range(COUNT) if i % 3}


@pytest.mark.parametrize("fault", SERVICE_FAULTS)
def test_a_retriever_with_a_fault(healthy: list[Episode], fault: str) -> None:
    with faulty_service(fault) as url:
        check(searched(url), healthy, set() if fault in HARMLESS else SEARCHING)


@pytest.mark.parametrize("fault", ["500", "malformed", "dying midway"])
def test_a_retriever_that_recovers_has_cost_nothing(healthy: list[Episode], fault: str) -> None:
    with faulty_service(fault, requests=2) as url:
        check(searched(url), healthy, set())


def test_a_retriever_that_is_gone(healthy: list[Episode]) -> None:
    with faulty_service(None) as url:
        index = Index("d", ServiceClient(url, describe_service(url).digest))
        check(run(ScriptedEngine(TOKENIZER, script), index), healthy, set())
    check(run(ScriptedEngine(TOKENIZER, script), index), healthy, set())  # what it has found is remembered
    gone = Index("d", index._source)
    check(run(ScriptedEngine(TOKENIZER, script), gone), healthy, SEARCHING)


FAULTS = sorted(ENGINE_FAULTS.keys() - {"slow", "NaN"})


@pytest.mark.parametrize("fault", ["slow", *FAULTS])
@pytest.mark.parametrize("turn", [0, 1])
def test_an_engine_with_a_fault(fault: str, turn: int) -> None:
    """In one turn of one episode in two: the others are what they would have been."""
    healthy = run(ScriptedEngine(TOKENIZER, script), Answering())
    engine = FaultyEngine(TOKENIZER, script, fault, lambda seed, now: seed[0] % 2 == 1 and now == turn)
    lost = {1, 3, 5} if turn == 0 else {1, 5}  # 3 has no second turn
    check(run(engine, Answering()), healthy, set() if fault == "slow" else lost)


def test_an_engine_that_dies_midway() -> None:
    """What had ended by then is kept."""
    healthy = run(ScriptedEngine(TOKENIZER, script), Answering())
    engine = FaultyEngine(TOKENIZER, script, "refusing", lambda seed, turn: turn > 0)
    check(run(engine, Answering()), healthy, SEARCHING)


def test_an_engine_without_numbers_ends_the_rollout() -> None:
    """The weights are broken: in training the step is dropped (test_watch.py), elsewhere the stage ends."""
    with pytest.raises(NotFinite, match="log-probability of a sampled token"):
        run(FaultyEngine(TOKENIZER, script, "NaN", lambda seed, _: seed[0] == 2), Answering())
