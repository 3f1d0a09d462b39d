"""Training examples of the embedded base models: the reading drill, and scripted expert episodes.

The drill is a text of up to three passages, followed by statements and question-answer pairs about them. It
teaches to find a value in a passage and nothing of the protocol: no tag, no search, no answer format occurs.

The expert, from whose episodes the teacher learns the protocol, knows the facts of its world, but searches
for each of them with the real index. Where that does not find the passage it repeats itself until its budget
ends, and the episode is thrown away.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dgpo_core.agent.engine import FinishReason, FunctionSession, Generation, Request
from dgpo_core.agent.episode import Owner
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.agent.prompts import document
from dgpo_core.config.agent import ProtocolConfig, Sampling
from dgpo_core.config.data import WorldConfig
from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.retrieval.index import index_passages
from dgpo_core.world.facts import Fact, World, generate_world
from dgpo_core.world.questions import (
    Article,
    Draft,
    QuestionWriter,
    ask_about,
    passages_by_fact,
    steps_of,
    write_articles,
)

# Weights of tokens in the loss. The names of the text teach to copy; the first token of a value is where it
# must be found, the others follow; a question cannot be foreseen.
TEXT_WEIGHT, CUE_WEIGHT, FIRST_WEIGHT, VALUE_WEIGHT, END_WEIGHT = 0.5, 0.1, 2.0, 1.0, 0.3
PASSAGES, MAX_FACTS = 3, 9  # of an example
SORTED_STEPS = 4  # share a draw that is cut by length, so that little of a batch is padding
# Shares of the expert's questions of one, two and three hops and of comparisons
MIXTURE = {"one": 0.25, "two": 0.4, "three": 0.2, "comparison": 0.15}
HOPS = {"one": 1, "two": 2, "three": 3}


@dataclass(frozen=True)
class Example:
    """Token ids and, for each of them, how much predicting it counts in the loss."""

    ids: list[int]
    weights: list[float]


def statement(fact: Fact) -> str:
    """Return the sentence in which the embedded models say what they have read, up to the value."""
    return f"{fact.relation.noun_phrase(fact.subject.mention)} is"


def told(world: World, fact: Fact) -> str:
    """Return what a passage tells of a fact: its value, or who has the same."""
    reference = world.reference(fact)
    return fact.value if reference is None else f"that of {reference.subject.mention}"


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
        """Draw the examples of one step, with `passages` passages each.

        SORTED_STEPS steps share a draw, which is cut by length.
        """
        group, part = divmod(step, SORTED_STEPS)
        drawn = self._group(seed, group, size * SORTED_STEPS, passages)
        return drawn[part * size : (part + 1) * size]

    def _draw(self, seed: int, group: int, count: int, passages: int) -> list[Example]:
        drawn = [self.example(f"{seed}-{group}-{i}", passages) for i in range(count)]
        return sorted(drawn, key=lambda example: len(example.ids))

    def example(self, seed: str, passages: int = PASSAGES) -> Example:
        rng = random.Random(seed)
        world, articles, by_name = rng.choice(self._worlds)
        chosen = _choose_passages(articles, by_name, passages, rng)
        text = "".join(document(i, p.title, p.text) for i, (p, _) in enumerate(chosen, 1))
        ids = list(self._ids(text))
        weights = [TEXT_WEIGHT] * len(ids)
        facts = [fact for _, facts in chosen for fact in facts]
        rng.shuffle(facts)
        for fact in facts[:MAX_FACTS]:
            asks = rng.random() < 0.5
            cue = f" {statement(fact)}"
            if asks:
                cue = f" {ask_about(fact, fact.subject.mention, rng)}?"
            cue_ids, value, end = map(self._encode, (cue, f" {told(world, fact)}", ".\n"))
            ids += cue_ids + value + end
            weights += [CUE_WEIGHT] * len(cue_ids) + [FIRST_WEIGHT] + [VALUE_WEIGHT] * (len(value) - 1)
            weights += [END_WEIGHT] * len(end)
        return Example(ids, weights)


PassageFacts = tuple[Passage, list[Fact]]


def _passages_with_facts(
    config: WorldConfig, seed: int
) -> tuple[World, list[Article], dict[str, list[PassageFacts]]]:
    """Write the articles of a world; return both, and the passages by each word of the names."""
    world = generate_world(config, seed)
    articles = write_articles(world)
    by_name: dict[str, list[PassageFacts]] = {}
    for article in articles:
        for pair in zip(article.passages, article.facts, strict=True):
            for word in article.entity.name.split(" "):
                by_name.setdefault(word, []).append(pair)
    return world, articles, by_name


def _choose_passages(
    articles: list[Article], by_name: dict[str, list[PassageFacts]], count: int, rng: random.Random
) -> list[PassageFacts]:
    """Draw `count` passages as a search would return them: mostly of entities with a word in common."""
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


def expert_examples(
    config: WorldConfig,
    world_seed: int,
    count: int,
    tokenizer: Any,
    protocol: ProtocolConfig,
    top_k: int,
    expansions: float = 0.0,
) -> list[Example]:
    """Run expert episodes in one world and return the correct ones; what the expert wrote has weight 1."""
    world = generate_world(config, world_seed)
    articles = write_articles(world)
    passages = [passage for article in articles for passage in article.passages]
    texts = {fact: passage.text for fact, passage in passages_by_fact(articles).items()}
    rng = random.Random(f"expert-{world_seed}")
    drafts = list(_drafts(QuestionWriter(world, "test", rng), rng, count))
    tasks = [
        Task(Question(str(i), draft.text, draft.answers), "expert", seed=(i,))
        for i, draft in enumerate(drafts)
    ]
    engine = ExpertEngine(world, drafts, texts, tokenizer, expansions)
    index = index_passages(passages, EncoderConfig(kind="bm25"))
    episodes = AgentLoop(engine, tokenizer, index, protocol, top_k).run(tasks, Sampling())
    return [
        Example(episode.token_ids, [float(owner == Owner.MODEL) for owner in episode.owners])
        for episode in episodes
        if episode.correct
    ]


def _drafts(writer: QuestionWriter, rng: random.Random, count: int) -> Iterator[Draft]:
    drawn = 0
    while drawn < count:
        kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        other = rng.random() < 0.5
        draft = writer.comparison() if kind == "comparison" else writer.chain(HOPS[kind], other=other)
        if draft is not None:
            drawn += 1
            yield draft


class ExpertEngine:
    """An engine that writes the expert's turns; a request's seed is (number of the draft, turn).

    It searches for a fact by the relation's name; in a share `expansions` of these queries it adds all words
    in which texts state such a fact. Where that has not found it, it searches in the words of one text after
    the other.
    """

    lane = None

    def __init__(
        self,
        world: World,
        drafts: list[Draft],
        texts: dict[tuple[int, str], str],
        tokenizer: Any,
        expansions: float,
    ) -> None:
        self._world, self._drafts, self._texts, self._tokenizer = world, drafts, texts, tokenizer
        self._expansions = expansions
        self._tried: Counter[tuple[int, int]] = Counter()  # searches for the nth step of a draft

    def session(self, stop: tuple[str, ...]) -> FunctionSession:
        return FunctionSession(self._turn)

    def _turn(self, request: Request) -> Generation:
        number, _ = request.seed
        draft = self._drafts[number]
        context = self._tokenizer.decode(request.token_ids)
        steps, known = steps_of(self._world, draft.facts), 0
        while known < len(steps) and self._text(steps[known]) in context:
            known += 1
        tried = self._tried[number, known]
        said = ""
        if known:
            said = f" {statement(steps[known - 1])} {told(self._world, steps[known - 1])}."
        self._tried[number, known] += 1
        if known < len(steps):
            expands = random.Random(f"{self._world.seed}-{number}-{known}").random() < self._expansions
            text = self._search(steps[known], said, tried, expands)
        else:
            text = f"<think>{said}{_conclusion(draft)} </think>\n<answer> {draft.answers[0]} </answer>"
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return Generation(ids, [0.0] * len(ids), FinishReason.STOP)

    def _text(self, fact: Fact) -> str:
        return self._texts[fact.subject.key, fact.relation.noun]

    def _search(self, fact: Fact, said: str, tried: int, expands: bool) -> str:
        wanted = fact.relation.noun_phrase(fact.subject.mention)
        query = wanted.removeprefix("the ")
        if expands:
            query = expanded(fact, query)
        if tried:
            words = fact.relation.statements[(tried - 1) % len(fact.relation.statements)]
            query = " ".join(words.format(s=fact.subject.mention, o="").strip(".").split())
            said = " I do not see it."
        return f"<think>{said} I need {wanted}. </think>\n<search> {query} </search>"


def expanded(fact: Fact, query: str) -> str:
    """Return the query with the words in which texts state such a fact, each once."""
    stated = " ".join(text.format(s="", o="") for text in fact.relation.statements)
    return " ".join(dict.fromkeys([*query.split(), *stated.replace(".", " ").replace(",", " ").split()]))


def _conclusion(draft: Draft) -> str:
    if draft.kind != "comparison":
        return ""
    first, second = sorted(fact.value for fact in draft.facts)
    return f" {first} is earlier than {second}."
