"""The articles of the embedded encyclopedia, cut into passages, and its seven question sets.

| set        | stands for      | content                                                | splits           |
|------------|-----------------|--------------------------------------------------------|------------------|
| onehop     | nq              | one fact                                               | train, dev, test |
| twohop     | hotpotqa        | two facts in a chain; some comparisons of two years    | train, dev, test |
| phrasing   | triviaqa        | one fact, in phrasings never used in training          | test             |
| rare       | popqa           | one fact, of an entity with a single, dense passage    | test             |
| comparison | 2wikimultihopqa | which of two films or people came first                | test             |
| threehop   | musique         | a chain of three facts                                 | test             |
| hard       | bamboogle       | chains of two, unseen phrasings, rare entities (125)   | test             |

Every fact belongs to one split, train, dev or test, and a question uses facts of its own split only.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dgpo_core.datasets.records import Passage, Question
from dgpo_core.errors import UserError
from dgpo_core.world.facts import (
    COMPARISONS,
    DISTRACTORS,
    INDIRECT,
    PRONOUNS,
    Entity,
    Fact,
    World,
    fact_split,
    passage_count,
    random_value,
)


@dataclass(frozen=True)
class Article:
    """An entity's article: its passages, and the facts that each of them states."""

    entity: Entity
    passages: list[Passage]
    facts: list[list[Fact]]


def write_articles(world: World) -> list[Article]:
    """Write one article an entity; the passages' ids count through the world in the articles' order."""
    rng = random.Random(f"articles-{world.seed}")
    articles, next_id = [], 0
    for entity in world.entities:
        facts = world.facts_of(entity)
        rng.shuffle(facts)
        size = -(-len(facts) // passage_count(world.config, entity.type)) if entity.popular else len(facts)
        groups = [facts[i : i + size] for i in range(0, len(facts), size)]
        groups += [[] for _ in range(world.config.asides if entity.popular else 0)]
        passages = []
        for group in groups:
            passages.append(Passage(str(next_id), entity.title, _text(world, entity, group, rng)))
            next_id += 1
        articles.append(Article(entity, passages, groups))
    return articles


def passages_by_fact(articles: list[Article]) -> dict[tuple[int, str], Passage]:
    """Return the passage that states each fact, by (key of the subject, noun of the relation)."""
    return {
        (fact.subject.key, fact.relation.noun): passage
        for article in articles
        for passage, facts in zip(article.passages, article.facts, strict=True)
        for fact in facts
    }


def _text(world: World, entity: Entity, facts: list[Fact], rng: random.Random) -> str:
    """Write sentences in random order; the first names the subject, later ones may use a pronoun."""
    sentences = [_statement(world, fact, rng) for fact in facts]
    for _ in range(world.config.distractors):
        template, object_type = rng.choice(DISTRACTORS[entity.type])
        sentences.append((template, random_value(world, object_type, rng)))
    rng.shuffle(sentences)
    written = []
    for position, (template, value) in enumerate(sentences):
        subject = entity.mention
        if position and template.startswith("{s}") and rng.random() < 0.5:
            subject = PRONOUNS.get(entity.type, "It")
        text = template.format(s=subject, o=value)
        written.append(text[0].upper() + text[1:])
    return " ".join(written)


def _statement(world: World, fact: Fact, rng: random.Random) -> tuple[str, str]:
    """Return the template of a sentence that states a fact, and its object."""
    template = rng.choice(fact.relation.statements)
    if reference := world.reference(fact):
        return INDIRECT.replace("{noun}", fact.relation.noun), reference.subject.mention
    return template, fact.value


def steps_of(world: World, facts: Sequence[Fact]) -> list[Fact]:
    """Return the facts that must be read to know `facts`: what an indirect one refers to comes after it."""
    return [step for fact in facts for step in (fact, world.reference(fact)) if step is not None]


@dataclass(frozen=True)
class Draft:
    """A question before it has an id: its text, answers, and the facts it asks for in order."""

    text: str
    answers: tuple[str, ...]
    facts: tuple[Fact, ...]
    kind: str  # chain | comparison


class QuestionWriter:
    """Drafts questions about the facts of one split (`train`, `dev` or `test`)."""

    def __init__(self, world: World, split: str, rng: random.Random) -> None:
        self.rng = rng
        self._asked = set(world.config.asked)
        self.facts = [
            fact
            for fact in world.facts.values()
            if fact_split(world, fact) == split and (split == "test" or fact.subject.popular)
        ]
        self._by_subject: dict[int, list[Fact]] = {}
        self._popular: dict[str, list[Fact]] = {}  # by the relation's noun
        for fact in self.facts:
            self._by_subject.setdefault(fact.subject.key, []).append(fact)
            if fact.subject.popular:
                self._popular.setdefault(fact.relation.noun, []).append(fact)

    def chain(self, hops: int, other: bool = False, rare: bool | None = None) -> Draft | None:
        """Ask for a chain of `hops` facts, each about the value before; None when the draw fails."""
        if not self.facts:
            return None
        fact = self.rng.choice(self.facts)
        if rare is not None and fact.subject.popular == rare:
            return None
        subject, facts = fact.subject.mention, [fact]
        while len(facts) < hops:
            following = self._by_subject.get(facts[-1].entity.key, []) if facts[-1].entity else []
            following = [f for f in following if f.relation.noun not in {g.relation.noun for g in facts}]
            if not following:
                return None
            subject = facts[-1].relation.noun_phrase(subject)
            facts.append(self.rng.choice(following))
        if facts[-1].kind not in self._asked:
            return None
        relation = facts[-1].relation
        phrasing = self.rng.choice(relation.other_questions if other else relation.questions)
        return Draft(phrasing.format(s=subject), (facts[-1].value,), tuple(facts), "chain")

    def comparison(self) -> Draft | None:
        """Ask which of two entities of one type has the earlier year; None when the draw fails."""
        noun = self.rng.choice(list(COMPARISONS))
        candidates = self._popular.get(noun, [])
        if len(candidates) < 2:
            return None
        first, second = self.rng.sample(candidates, 2)
        if first.value == second.value:
            return None
        earlier = min(first, second, key=lambda fact: fact.value).subject
        text = self.rng.choice(COMPARISONS[noun]).format(a=first.subject.name, b=second.subject.name)
        return Draft(text, (earlier.name,), (first, second), "comparison")


def write_questions(world: World, articles: list[Article]) -> dict[tuple[str, str], list[Question]]:
    """Write all questions, by (set, split)."""
    rng = random.Random(f"questions-{world.seed}")
    sizes = world.config.questions
    finish = _QuestionFinisher(world, articles)
    writers = {split: QuestionWriter(world, split, rng) for split in ("train", "dev", "test")}
    test = writers["test"]

    def one_hop(writer: QuestionWriter) -> Draft | None:
        return writer.chain(1, rare=False)

    def two_hop(writer: QuestionWriter) -> Draft | None:
        return writer.comparison() if rng.random() < world.config.comparison_share else writer.chain(2)

    counts = {"train": sizes.train, "dev": sizes.dev, "test": sizes.test}
    questions: dict[tuple[str, str], list[Question]] = {}
    for name, draft in (("onehop", one_hop), ("twohop", two_hop)):
        for split, writer in writers.items():
            questions[name, split] = finish(name, split, counts[split], partial(draft, writer))
    tested: dict[str, Callable[[], Draft | None]] = {
        "phrasing": lambda: test.chain(1, other=True, rare=False),
        "rare": lambda: test.chain(1, rare=True),
        "comparison": test.comparison,
        "threehop": lambda: test.chain(3),
        "hard": lambda: test.chain(2, other=True, rare=True),
    }
    for name, draft_test in tested.items():
        questions[name, "test"] = finish(
            name, "test", sizes.hard if name == "hard" else sizes.test, draft_test
        )
    return questions


class _QuestionFinisher:
    """Turns drafts into questions: no text twice, ids, golden passages and long answers."""

    def __init__(self, world: World, articles: list[Article]) -> None:
        self._world = world
        self._passage = passages_by_fact(articles)
        self._seen: set[str] = set()

    def __call__(
        self, name: str, split: str, count: int, draft: Callable[[], Draft | None]
    ) -> list[Question]:
        drafts = []
        for attempt in _attempts(draft, 400 * count + 1000):
            if attempt.text not in self._seen:
                self._seen.add(attempt.text)
                drafts.append(attempt)
            if len(drafts) == count:
                return [self._question(f"{name}-{split}-{i}", d) for i, d in enumerate(drafts)]
        raise UserError(
            f"world.questions: this world has too few facts for {count} {name} {split} questions "
            f"(found {len(drafts)}); raise world.passages or lower world.questions"
        )

    def _question(self, question_id: str, draft: Draft) -> Question:
        steps = steps_of(self._world, draft.facts)
        passages = [self._passage[f.subject.key, f.relation.noun] for f in steps]
        unique = list({passage.id: passage for passage in passages}.values())
        metadata: dict[str, Any] = {
            "kind": draft.kind,
            "hops": len(steps),
            "golden_passages": [{"id": p.id, "title": p.title, "text": p.text} for p in unique],
            "long_answers": [unique[-1].text],
        }
        return Question(question_id, draft.text, draft.answers, metadata)


def _attempts(draft: Callable[[], Draft | None], limit: int) -> Iterator[Draft]:
    for _ in range(limit):
        if (attempt := draft()) is not None:
            yield attempt


def ask_about(fact: Fact, subject: str, rng: random.Random) -> str:
    """Ask for one fact in one of all its phrasings."""
    return rng.choice(fact.relation.questions + fact.relation.other_questions).format(s=subject)
