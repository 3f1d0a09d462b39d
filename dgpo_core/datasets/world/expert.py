"""Scripted expert episodes: what the embedded teacher learns the protocol from.

The expert knows the facts of its world, but searches for each of them with the real index. Where that does
not find the passage it repeats itself until its budget ends, and the episode is thrown away.
"""

import random
from collections.abc import Iterator
from typing import Any

from dgpo_core.config.data import WorldConfig
from dgpo_core.config.protocol import ProtocolConfig, Sampling
from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.datasets.records import Question
from dgpo_core.datasets.world.articles import write_articles
from dgpo_core.datasets.world.generate import Fact, generate_world
from dgpo_core.datasets.world.questions import Draft, QuestionWriter
from dgpo_core.datasets.world.reading import Example, statement
from dgpo_core.protocol.episode import Owner
from dgpo_core.retrieval.index import index_passages
from dgpo_core.rollout.engine import Finish, Generation, Request
from dgpo_core.rollout.loop import AgentLoop, Task

# shares of one, two and three hops and of comparisons
MIXTURE = {"one": 0.25, "two": 0.4, "three": 0.2, "comparison": 0.15}
HOPS = {"one": 1, "two": 2, "three": 3}


def expert_examples(
    config: WorldConfig, world_seed: int, count: int, tokenizer: Any, protocol: ProtocolConfig, top_k: int
) -> list[Example]:
    """Correct expert episodes of one world; what the expert wrote has weight 1, all else 0."""
    world = generate_world(config, world_seed)
    articles = write_articles(world)
    passages = [passage for article in articles for passage in article.passages]
    texts = {
        (fact.subject.key, fact.relation.noun): passage.text
        for article in articles
        for passage, facts in zip(article.passages, article.facts, strict=True)
        for fact in facts
    }
    rng = random.Random(f"expert-{world_seed}")
    drafts = list(_drafts(QuestionWriter(world, "test", rng), rng, count))
    tasks = [
        Task(Question(str(i), draft.text, draft.answers), "expert", seed=(i,))
        for i, draft in enumerate(drafts)
    ]
    engine = ExpertEngine(drafts, texts, tokenizer)
    index = index_passages(passages, EncoderConfig(kind="bm25"))
    episodes = AgentLoop(engine, tokenizer, index, protocol, top_k).run(tasks, Sampling())
    return [
        Example(episode.token_ids, [float(owner == Owner.MODEL) for owner in episode.owners])
        for episode in episodes
        if episode.correct
    ]


def _drafts(writer: QuestionWriter, rng: random.Random, count: int) -> Iterator[Draft]:
    made = 0
    while made < count:
        kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        other = rng.random() < 0.5
        draft = writer.comparison() if kind == "comparison" else writer.chain(HOPS[kind], other=other)
        if draft is not None:
            made += 1
            yield draft


class ExpertEngine:
    """Writes the expert's turns; a request's seed is (number of the draft, turn)."""

    def __init__(self, drafts: list[Draft], texts: dict[tuple[int, str], str], tokenizer: Any) -> None:
        self._drafts, self._texts, self._tokenizer = drafts, texts, tokenizer
        self._begun: set[int] = set()  # drafts whose first turn is written

    def generate(
        self, requests: list[Request], sampling: Sampling, stop: tuple[str, ...]
    ) -> list[Generation]:
        return [self._turn(request) for request in requests]

    def _turn(self, request: Request) -> Generation:
        number, _ = request.seed
        draft = self._drafts[number]
        context = self._tokenizer.decode(request.token_ids)
        known = 0
        while known < len(draft.facts) and self._text(draft.facts[known]) in context:
            known += 1
        said = ""
        if known and number in self._begun:
            read = draft.facts[known - 1]
            said = f" {statement(read)} {read.value}."
        self._begun.add(number)
        if known < len(draft.facts):
            text = self._search(draft.facts[known], said)
        else:
            text = f"<think>{said}{_conclusion(draft)} </think>\n<answer> {draft.answers[0]} </answer>"
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return Generation(ids, [0.0] * len(ids), Finish.STOP)

    def _text(self, fact: Fact) -> str:
        return self._texts[fact.subject.key, fact.relation.noun]

    def _search(self, fact: Fact, said: str) -> str:
        wanted = fact.relation.noun_phrase(fact.subject.mention)
        query = wanted.removeprefix("the ")
        return f"<think>{said} I need {wanted}. </think>\n<search> {query} </search>"


def _conclusion(draft: Draft) -> str:
    if draft.kind != "comparison":
        return ""
    first, second = sorted(fact.value for fact in draft.facts)
    return f" {first} is earlier than {second}."
