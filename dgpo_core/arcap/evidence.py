"""Which evidence a question needs, and which of its searches found it."""

from typing import Any

from dgpo_core.datasets.records import Question
from dgpo_core.protocol.episode import Search

ANY_HIT = "a passage with a golden answer"  # what is needed where the gold passages are not known


def golden_passages(question: Question) -> list[dict[str, Any]]:
    """{"id", "title", "text"} of each; empty unless the metadata names all of them by their corpus ids."""
    passages: list[dict[str, Any]] = question.metadata.get("golden_passages") or []
    return passages if all(passage.get("id") for passage in passages) else []


def needed(question: Question) -> frozenset[str]:
    """The ids of all gold passages (one or more a hop); ANY_HIT where they are not known."""
    return frozenset(str(passage["id"]) for passage in golden_passages(question)) or frozenset({ANY_HIT})


def new_evidence(question: Question, searches: list[Search]) -> list[frozenset[str]]:
    """For each search, the needed evidence that it was the first to retrieve."""
    gains, missing = [], needed(question)
    for search in searches:
        retrieved = {*search.passage_ids, *([ANY_HIT] if search.hit else [])}
        gains.append(missing & retrieved)
        missing -= retrieved
    return gains


def missing_evidence(question: Question, searches: list[Search]) -> frozenset[str]:
    """What none of the searches retrieved."""
    return needed(question).difference(*new_evidence(question, searches))
