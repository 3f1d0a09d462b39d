"""The question sets, checked from the questions alone: texts, answers and golden passages."""

import re
from collections.abc import Iterator

import pytest

from dgpo_core.config.data import QuestionCounts, WorldConfig
from dgpo_core.datasets.records import Question
from dgpo_core.errors import UserError
from dgpo_core.world import facts as r
from dgpo_core.world.facts import World, generate_world
from dgpo_core.world.questions import Article, write_articles, write_questions
from tests.dgpo_core.making import SMALL_WORLD

Made = dict[tuple[str, str], list[Question]]
Key = tuple[str, str]  # name of the subject, noun of the relation


@pytest.fixture(scope="module")
def made(world: World, articles: list[Article]) -> Made:
    return write_questions(world, articles)


def pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{s\}", "(?P<s>.+)"))


ASKS = [
    (pattern(template), relation)
    for relation in r.RELATIONS
    for template in (*relation.questions, *relation.other_questions)
]
OF = [(pattern(f"the {relation.noun} of {{s}}"), relation) for relation in r.RELATIONS]


def facts_asked(world: World, question: Question) -> set[Key]:
    """The facts that a question asks for, read off its text from the outer relation inwards."""
    if question.metadata["kind"] == "comparison":
        noun = next(
            noun for noun, texts in r.COMPARISONS.items() if question.question.startswith(texts[0][:10])
        )
        names = re.split(r", | or ", question.question)[1:]
        return {(name, noun) for name in names}
    readings = list(_chains(world, question.question, ASKS))
    correct = [keys for value, keys in readings if value in question.golden_answers]
    assert correct, question
    longest: list[Key] = max(correct, key=len)
    return set(longest)


def _chains(
    world: World, text: str, patterns: list[tuple[re.Pattern[str], r.Relation]]
) -> Iterator[tuple[str, list[Key]]]:
    """(value, facts used) of each way to read a text as relations around an entity's mention."""
    for regex, relation in patterns:
        match = regex.fullmatch(text)
        if match is None:
            continue
        for entity in world.of_type(relation.subject):
            if entity.mention == match["s"]:
                fact = world.fact(entity, relation.noun)
                yield fact.value, [(entity.name, relation.noun)]
        for value, keys in _chains(world, match["s"], OF):
            for entity in world.of_type(relation.subject):
                if entity.name == value:
                    yield world.fact(entity, relation.noun).value, [*keys, (value, relation.noun)]


def test_sizes(made: Made) -> None:
    sizes = SMALL_WORLD.questions
    tested = ("onehop", "twohop", "phrasing", "rare", "comparison", "threehop")
    expected = {(name, "test"): sizes.test for name in tested} | {("hard", "test"): sizes.hard}
    expected |= {(name, "train"): sizes.train for name in ("onehop", "twohop")}
    expected |= {(name, "dev"): sizes.dev for name in ("onehop", "twohop")}
    assert {key: len(questions) for key, questions in made.items()} == expected


def test_texts_and_ids_are_unique(made: Made) -> None:
    questions = [question for part in made.values() for question in part]
    assert len({question.question for question in questions}) == len(questions)
    assert len({question.id for question in questions}) == len(questions)


def test_training_and_test_ask_for_different_facts(world: World, made: Made) -> None:
    asked: dict[bool, set[Key]] = {True: set(), False: set()}
    for (_, split), questions in made.items():
        for question in questions:
            asked[split == "test"] |= facts_asked(world, question)
    assert len(asked[True]) > 100
    assert len(asked[False]) > 80
    assert not asked[True] & asked[False]


@pytest.mark.parametrize(("name", "hops"), [("onehop", 1), ("phrasing", 1), ("rare", 1), ("threehop", 3)])
def test_number_of_hops(world: World, made: Made, name: str, hops: int) -> None:
    for question in made[name, "test"]:
        assert question.metadata["hops"] == hops
        assert len(facts_asked(world, question)) == hops


def test_golden_answers_stand_in_golden_passages(made: Made, articles: list[Article]) -> None:
    corpus = {p.id: p for article in articles for p in article.passages}
    for questions in made.values():
        for question in questions:
            golden = question.metadata["golden_passages"]
            assert all(corpus[p["id"]].text == p["text"] for p in golden)
            assert question.metadata["long_answers"] == [golden[-1]["text"]]
            where = " ".join(p["title"] + p["text"] for p in golden)
            if question.metadata["kind"] == "chain":
                where = golden[-1]["text"]
            assert question.golden_answers[0] in where, question


def test_comparisons_name_the_earlier(world: World, made: Made) -> None:
    for question in made["comparison", "test"]:
        years = {}
        for name, noun in facts_asked(world, question):
            entity = next(
                e
                for e in world.entities
                if e.name == name
                and (e.type == "person") == (noun[0] == "b")
                and e.type in ("person", "film")
            )
            years[name] = int(world.fact(entity, noun).value)
        assert question.golden_answers == (min(years, key=lambda name: years[name]),)
        assert len(set(years.values())) == 2


def test_phrasings_of_the_unseen_sets_are_in_no_training_question(made: Made) -> None:
    trained = {template for relation in r.RELATIONS for template in relation.questions}
    for relation in r.RELATIONS:
        assert not trained & set(relation.other_questions)
    seen = [pattern(template) for template in sorted(trained)]
    other = [pattern(t) for relation in r.RELATIONS for t in relation.other_questions]
    for name in ("onehop", "twohop"):
        for question in [*made[name, "train"], *made[name, "dev"]]:
            assert question.metadata["kind"] == "comparison" or any(
                p.fullmatch(question.question) for p in seen
            )
    for name in ("phrasing", "hard"):
        for question in made[name, "test"]:
            assert any(p.fullmatch(question.question) for p in other)
            assert not any(p.fullmatch(question.question) for p in seen), question.question


def test_rare_questions_are_about_single_passages(made: Made, articles: list[Article]) -> None:
    single = {article.passages[0].id for article in articles if len(article.passages) == 1}
    for question in made["rare", "test"]:
        assert question.metadata["golden_passages"][0]["id"] in single


def test_too_many_questions_for_a_world() -> None:
    world = generate_world(WorldConfig(passages=150, questions=QuestionCounts(train=400)), 1)
    with pytest.raises(UserError, match=r"world\.questions: .*too few facts for 400 onehop train questions"):
        write_questions(world, write_articles(world))
