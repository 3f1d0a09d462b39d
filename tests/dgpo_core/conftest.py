"""Real parts that are built once for all tests."""

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.retrieval.index import Index, index_passages
from dgpo_core.world.facts import World, generate_world
from dgpo_core.world.pretraining import build_tokenizer
from dgpo_core.world.questions import Article, write_articles
from tests.dgpo_core.making import SMALL_WORLD, tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Not to be trained: tests that train build their own."""
    return tiny_model(tokenizer)


@pytest.fixture(scope="session")
def world() -> World:
    return generate_world(SMALL_WORLD, 7)


@pytest.fixture(scope="session")
def articles(world: World) -> list[Article]:
    return write_articles(world)


@pytest.fixture(scope="session")
def index(articles: list[Article]) -> Index:
    return index_passages([p for article in articles for p in article.passages], EncoderConfig(kind="bm25"))
