"""A world in which to search is a game: what queries find, what passages leave to others, the expert."""

import random
import re
from collections import Counter

import pytest
from transformers import PreTrainedTokenizerFast

from dgpo_core.config.agent import ProtocolConfig
from dgpo_core.config.data import WorldConfig
from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.retrieval.index import index_passages
from dgpo_core.world.facts import Fact, World, fact_split, generate_world, relations_of
from dgpo_core.world.lessons import ReadingDrill, expanded, expert_examples
from dgpo_core.world.questions import Article, passages_by_fact, write_articles, write_questions

CONFIG = WorldConfig.model_validate(
    {"passages": 2000, "facts_per_passage": 1, "asides": 2, "ambiguity": 0.6, "indirect": 0.3}
    | {"questions": {"train": 150, "dev": 20, "test": 30, "hard": 10}}
)
PROTOCOL = ProtocolConfig.model_validate({"instruction": "short", "max_new_tokens": 64})


@pytest.fixture(scope="module")
def scattered() -> World:
    return generate_world(CONFIG, 3)


@pytest.fixture(scope="module")
def written(scattered: World) -> list[Article]:
    return write_articles(scattered)


def test_a_passage_states_one_fact_and_some_none(scattered: World, written: list[Article]) -> None:
    assert sum(len(article.passages) for article in written) == pytest.approx(2000, rel=0.05)
    for article in written:
        facts = len(relations_of(article.entity.type))
        stated = [len(own) for own in article.facts]
        assert stated == ([1] * facts + [0, 0] if article.entity.popular else [facts])


def test_an_indirect_fact_names_one_of_the_same_value_and_split(
    scattered: World, written: list[Article]
) -> None:
    passages = passages_by_fact(written)
    assert len(scattered.references) > 0.03 * len(scattered.facts)
    for key, other in scattered.references.items():
        fact = scattered.facts[key]
        assert (other.relation, other.value) == (fact.relation, fact.value) and other.subject != fact.subject
        assert fact_split(scattered, other) == fact_split(scattered, fact)
        assert scattered.reference(other) is None, "a reader is sent on twice"
        said = rf"the same {fact.relation.noun} as {re.escape(other.subject.mention)}\."
        assert re.search(said, passages[key].text) and not fact_is_told(fact, passages[key].text)


def fact_is_told(fact: Fact, text: str) -> bool:
    """Whether a statement of the fact stands in the text, with the subject or a pronoun."""
    subjects = [fact.subject.mention, f"The{fact.subject.mention[3:]}", "It", "This person"]
    told = {t.format(s=s, o=fact.value) for t in fact.relation.statements for s in subjects}
    return any(sentence in text for sentence in told)


def test_questions_do_not_say_how_many_passages_they_need(scattered: World, written: list[Article]) -> None:
    questions = write_questions(scattered, written)
    hops = Counter(q.metadata["hops"] for q in questions["onehop", "train"])
    assert hops[2] >= 5 and hops[1] > hops[2]
    for question in questions["onehop", "train"]:
        golden = question.metadata["golden_passages"]
        assert len(golden) == question.metadata["hops"]
        assert question.golden_answers[0] in golden[-1]["text"]


def test_a_better_query_finds_what_the_first_one_misses(scattered: World, written: list[Article]) -> None:
    """By the name of the relation, as the teacher searches first; with the words in which texts state it."""
    index = index_passages([p for a in written for p in a.passages], EncoderConfig(kind="bm25"))
    passages = passages_by_fact(written)
    popular = [fact for key, fact in scattered.facts.items() if fact.subject.popular]
    asked = random.Random(0).sample([f for f in popular if scattered.reference(f) is None], 300)

    def found(queries: list[str]) -> float:
        pairs = zip(asked, index.search(queries, 3), strict=True)
        hits = [
            passages[f.subject.key, f.relation.noun].id in [h.passage.id for h in own] for f, own in pairs
        ]
        return sum(hits) / len(hits)

    assert 0.6 < found([f"{f.relation.noun} of {f.subject.mention}" for f in asked]) < 0.8
    assert found([expanded(f, f"{f.relation.noun} of {f.subject.mention}") for f in asked]) > 0.95


def test_an_expert_rewrites_queries_that_have_found_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [str(tokenizer.decode(e.ids)) for e in expert_examples(CONFIG, 5, 60, tokenizer, PROTOCOL, 3)]
    searches = [re.findall(r"<search> (.*?) </search>", text) for text in texts]
    assert all(len(set(own)) == len(own) for own in searches), "a search is repeated"
    assert len(texts) > 50 and sum("I do not see it." in text for text in texts) > 0.25 * len(texts)
    assert any(" is that of " in text for text in texts)


def test_an_expert_that_expands_some_queries_needs_fewer(
    scattered: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    def searches(expansions: float) -> list[list[str]]:
        examples = expert_examples(CONFIG, 5, 60, tokenizer, PROTOCOL, 3, expansions)
        texts = [str(tokenizer.decode(example.ids)) for example in examples]
        return [re.findall(r"<search> (.*?) </search>", text) for text in texts]

    plain, some, every = (searches(share) for share in (0.0, 0.5, 1.0))
    assert sum(map(len, every)) < sum(map(len, plain)) and len(every) >= len(plain)
    fact = next(fact for fact in scattered.facts.values() if fact.relation.noun == "school")
    plainly, words = f"school of {fact.subject.mention}", "studied at was educated had a degree from"
    assert expanded(fact, plainly) == f"{plainly} {words}"
    firsts = [own[0] in {query for (query, *_) in plain} for own in some]
    assert 0.3 < sum(firsts) / len(firsts) < 0.7


def test_the_drill_asks_in_all_phrasings_and_reads_indirect_facts(
    scattered: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    drill = ReadingDrill(CONFIG, range(7, 8), tokenizer)
    text = "".join(str(tokenizer.decode(drill.example(str(i)).ids)) for i in range(120))
    assert re.search("In which place was|Which city did|Whom did|In what year was|Which company did", text)
    assert re.search(r" is that of |\? that of ", text)
