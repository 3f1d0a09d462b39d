"""The reading drill: what the embedded base models are pre-trained on.

A text of three passages, followed by statements and question-answer pairs about them. It teaches to find a
value in a passage and nothing of the protocol: no tag, no search, no answer format occurs.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dgpo_core.config.data import WorldConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.datasets.world.articles import Article, write_articles
from dgpo_core.datasets.world.generate import Fact, generate_world
from dgpo_core.datasets.world.questions import ask_about
from dgpo_core.protocol.prompts import document

# What predicting a token counts. The names of the text teach to copy; the first token of a value is where it
# must be found, the others follow; a question cannot be foreseen.
TEXT_WEIGHT, CUE_WEIGHT, FIRST_WEIGHT, VALUE_WEIGHT, END_WEIGHT = 0.5, 0.1, 2.0, 1.0, 0.3
PASSAGES, MAX_FACTS, SORTED_STEPS = 3, 9, 4


@dataclass(frozen=True)
class Example:
    """Token ids and, for each of them, how much predicting it counts in the loss."""

    ids: list[int]
    weights: list[float]


def statement(fact: Fact) -> str:
    """The sentence in which the embedded models say what they have read."""
    return f"{fact.relation.noun_phrase(fact.subject.mention)} is"


class ReadingDrill:
    """Endless examples from many generated worlds; `example(seed)` depends on nothing but its argument."""

    def __init__(self, config: WorldConfig, world_seeds: range, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._encode = lru_cache(maxsize=None)(self._ids)  # cues and values come back in many examples
        self._worlds = [_passages_with_facts(config, seed) for seed in world_seeds]
        self._group = lru_cache(maxsize=1)(self._draw)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def batch(self, seed: int, step: int, size: int, passages: int) -> list[Example]:
        """The examples of one step, with `passages` passages each.

        Four steps share a draw that is cut by length, so that little of a batch is padding.
        """
        group, part = divmod(step, SORTED_STEPS)
        drawn = self._group(seed, group, size * SORTED_STEPS, passages)
        return drawn[part * size : (part + 1) * size]

    def _draw(self, seed: int, group: int, count: int, passages: int) -> list[Example]:
        drawn = [self.example(f"{seed}-{group}-{i}", passages) for i in range(count)]
        return sorted(drawn, key=lambda example: len(example.ids))

    def example(self, seed: str, passages: int = PASSAGES) -> Example:
        rng = random.Random(seed)
        articles, by_name = rng.choice(self._worlds)
        chosen = _choose_passages(articles, by_name, passages, rng)
        text = "".join(document(i, p.title, p.text) for i, (p, _) in enumerate(chosen, 1))
        ids = list(self._ids(text))
        weights = [TEXT_WEIGHT] * len(ids)
        facts = [fact for _, facts in chosen for fact in facts]
        rng.shuffle(facts)
        for fact in facts[:MAX_FACTS]:
            asks = rng.random() < 0.5
            cue = f" {ask_about(fact, fact.subject.mention, rng)}?" if asks else f" {statement(fact)}"
            cue_ids, value, end = map(self._encode, (cue, f" {fact.value}", ".\n"))
            ids += cue_ids + value + end
            weights += [CUE_WEIGHT] * len(cue_ids) + [FIRST_WEIGHT] + [VALUE_WEIGHT] * (len(value) - 1)
            weights += [END_WEIGHT] * len(end)
        return Example(ids, weights)


PassageFacts = tuple[Passage, list[Fact]]


def _passages_with_facts(
    config: WorldConfig, seed: int
) -> tuple[list[Article], dict[str, list[PassageFacts]]]:
    """The articles of a world, and its passages by each word of their titles."""
    articles = write_articles(generate_world(config, seed))
    by_name: dict[str, list[PassageFacts]] = {}
    for article in articles:
        for pair in zip(article.passages, article.facts, strict=True):
            for word in article.entity.name.split(" "):
                by_name.setdefault(word, []).append(pair)
    return articles, by_name


def _choose_passages(
    articles: list[Article], by_name: dict[str, list[PassageFacts]], count: int, rng: random.Random
) -> list[PassageFacts]:
    """`count` passages as a search would return them: mostly of entities that share a word of their names."""
    article = rng.choice(articles)
    alike = [pair for word in article.entity.name.split(" ") for pair in by_name[word]]
    pool = {pair[0].id: pair for pair in rng.sample(alike, min(len(alike), 2 * count))}
    own = list(zip(article.passages, article.facts, strict=True))
    chosen = {pair[0].id: pair for pair in rng.sample(own, min(len(own), count))}
    for key, pair in pool.items():
        if len(chosen) < count and rng.random() < 0.8:
            chosen.setdefault(key, pair)
    while len(chosen) < count:
        other = rng.choice(articles)
        index = rng.randrange(len(other.passages))
        chosen.setdefault(other.passages[index].id, (other.passages[index], other.facts[index]))
    pairs = list(chosen.values())
    rng.shuffle(pairs)
    return pairs
