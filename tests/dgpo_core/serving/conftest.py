"""A real agent: the committed teacher, and the index of a small world."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import ProtocolConfig, RolloutConfig
from dgpo_core.datasets.records import Question
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.retrieval.index import Index
from dgpo_core.retrieval.ranking import Hit, Retriever
from dgpo_core.serving.agent import Agent
from dgpo_core.world.facts import World
from dgpo_core.world.questions import Article, write_questions
from tests.dgpo_core.agent.scripted import Answering

TEACHER = str(Path(__file__).resolve().parents[3] / "models" / "teacher")
PROTOCOL = ProtocolConfig(
    instruction="short", max_turns=4, max_context=1024, max_new_tokens=64, max_information=320
)
FLOAT32 = RolloutConfig(precision="float32")
MakeAgent = Callable[[Retriever], Agent]


class Gate:
    """A retriever that holds searches while the gate is closed: so an episode can be held."""

    def __init__(self, retriever: Retriever | None = None) -> None:
        self.retriever = retriever or Answering()
        self.digest = self.retriever.digest
        self.reached, self.opened = threading.Event(), threading.Event()
        self.calls = 0

    def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        self.reached.set()
        assert self.opened.wait(20)
        self.calls += 1
        return self.retriever.search(queries, top_k)


@pytest.fixture(scope="session")
def teacher() -> PreTrainedModel:
    return load_model(TEACHER)


@pytest.fixture(scope="session")
def questions(world: World, articles: list[Article]) -> list[Question]:
    """One- and two-hop questions in turn."""
    made = write_questions(world, articles)
    pairs = zip(made["onehop", "test"], made["twohop", "test"], strict=False)
    return [question for pair in pairs for question in pair]


@pytest.fixture(scope="session")
def make_agent(teacher: PreTrainedModel) -> MakeAgent:
    tokenizer = load_tokenizer(TEACHER)
    engine = TransformersEngine(teacher, tokenizer, FLOAT32)
    return lambda retriever: Agent("teacher", engine, tokenizer, retriever, PROTOCOL, 3)


@pytest.fixture(scope="session")
def agent(make_agent: MakeAgent, index: Index) -> Agent:
    return make_agent(index)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _seconds: None)
