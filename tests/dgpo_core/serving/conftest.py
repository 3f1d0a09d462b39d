"""A real agent: the committed teacher, and the index of a small world."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from dgpo_core.config.agent import ProtocolConfig, RolloutConfig
from dgpo_core.datasets.records import Question
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.retrieval.index import Index
from dgpo_core.serving.agent import Agent
from dgpo_core.world.facts import World
from dgpo_core.world.questions import Article, write_questions

TEACHER = str(Path(__file__).resolve().parents[3] / "models" / "teacher")
PROTOCOL = ProtocolConfig(
    instruction="short", max_turns=4, max_context=1024, max_new_tokens=64, max_information=320
)
FLOAT32 = RolloutConfig(precision="float32")


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
def agent(teacher: PreTrainedModel, index: Index) -> Agent:
    return Agent("teacher", teacher, load_tokenizer(TEACHER), index, PROTOCOL, FLOAT32, 3)
