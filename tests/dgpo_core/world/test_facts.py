"""A world is a function of its configuration and seed."""

from dgpo_core.world.facts import World, generate_world
from dgpo_core.world.questions import Article, write_articles, write_questions
from tests.dgpo_core.making import SMALL_WORLD


def test_same_seed_same_world(world: World, articles: list[Article]) -> None:
    again = generate_world(SMALL_WORLD, 7)
    assert again == world
    assert write_articles(again) == articles
    assert write_questions(again, articles) == write_questions(world, articles)


def test_other_seed_other_world(world: World) -> None:
    other = generate_world(SMALL_WORLD, 8)
    names = {entity.name for entity in world.entities}
    shared = [entity for entity in other.entities if entity.name in names]
    assert len(shared) < 0.3 * len(other.entities)


def test_size_and_titles(world: World, articles: list[Article]) -> None:
    passages = [p for article in articles for p in article.passages]
    assert abs(len(passages) - SMALL_WORLD.passages) < 0.1 * SMALL_WORLD.passages
    assert len({p.id for p in passages}) == len(passages)
    titles = [entity.title for entity in world.entities]
    assert len(set(titles)) == len(titles)
    names = [entity.name for entity in world.entities if entity.type != "person"]
    assert len(set(names)) < len(names), "no name is ambiguous"


def test_articles_state_every_fact_once(world: World, articles: list[Article]) -> None:
    stated = [fact for article in articles for facts in article.facts for fact in facts]
    assert sorted((fact.subject.key, fact.relation.noun) for fact in stated) == sorted(world.facts)
    for article in articles:
        assert len(article.passages) == (2 if article.entity.popular else 1)
        for passage, facts in zip(article.passages, article.facts, strict=True):
            assert all(fact.value in passage.text for fact in facts)
            assert article.entity.name in passage.text
