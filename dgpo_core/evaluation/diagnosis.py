"""Why an episode is wrong: which capability failed first (beyond the paper; docs/method.md, "Diagnosis").

It follows from what the model itself wrote (no text of the environment gets here), from the evidence that the
question needs and which search found it, and from the words of each query. Beside it stand checks for ways
to score, or to look busy, without searching well.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa

from dgpo_core.agent.actions import ActionKind, parse_action
from dgpo_core.agent.episode import Decode, Ending, Episode, Outcome, Search
from dgpo_core.datasets.records import Question
from dgpo_core.text import normalize, stands_in

_ATTEMPT = re.compile(r"<answer>(.*?)(?=</?(?:think|search|information|answer)>|\Z)", re.DOTALL)


def answer_attempts(turns: list[str]) -> list[str]:
    """Return the stripped content of each `<answer>` that the model opened, up to the next tag or turn's end.

    Unlike the prediction, these include answers that were empty, nested or never closed.
    """
    return [match[1].strip() for turn in turns for match in _ATTEMPT.finditer(turn)]


ANY_HIT = "a passage with a golden answer"  # what is needed where the gold passages are not known


def golden_passages(question: Question) -> list[dict[str, Any]]:
    """Return {"id", "title", "text"} of each; empty unless the metadata names all of them by corpus ids."""
    passages: list[dict[str, Any]] = question.metadata.get("golden_passages") or []
    return passages if all(passage.get("id") for passage in passages) else []


def needed(question: Question) -> frozenset[str]:
    """Return the ids of all gold passages (one or more a hop); ANY_HIT where they are not known."""
    return frozenset(str(passage["id"]) for passage in golden_passages(question)) or frozenset({ANY_HIT})


def new_evidence(question: Question, searches: list[Search]) -> list[frozenset[str]]:
    """Return for each search the needed evidence that it was the first to retrieve."""
    gains, missing = [], needed(question)
    for search in searches:
        retrieved = {*search.passage_ids, *([ANY_HIT] if search.hit else [])}
        gains.append(missing & retrieved)
        missing -= retrieved
    return gains


def missing_evidence(question: Question, searches: list[Search]) -> frozenset[str]:
    """Return the needed evidence that none of the searches retrieved."""
    return needed(question).difference(*new_evidence(question, searches))


# words that name nothing: question words, auxiliaries, prepositions, conjunctions, pronouns
FUNCTION_WORDS = frozenset(
    "who whom whose what which when where why how many much is are was were be been being do does did has "
    "have had can could will would in on at of off to from by for with into about as than and or but not "
    "that this these those it its he his him she her they their there".split()
)
_POSSESSIVE = re.compile(r"['\N{RIGHT SINGLE QUOTATION MARK}]s\b")
_QUALIFIER = re.compile(r"\s*\([^)]*\)$")  # "Harbour (film)": what tells a title from others is no name


def content_words(text: str) -> frozenset[str]:
    """Return normalised words without function words; a possessive 's is no part of a word."""
    return frozenset(normalize(_POSSESSIVE.sub("", text)).split()) - FUNCTION_WORDS


def repeats(query: str, texts: list[str]) -> bool:
    """Test whether the normalised query is one of the normalised texts."""
    return normalize(query) in {normalize(text) for text in texts}


def is_sensible(query: str, question: Question, earlier: list[str], missing: frozenset[str]) -> bool:
    """Test whether a query after the `earlier` ones could be expected to find the `missing` evidence.

    It must not repeat an earlier query. It must name a missing gold passage: have more than half of the
    words of its title that the model could know, from the question or from gold passages retrieved before.
    Where it could know no such word, any content word of these will do. Without known gold passages, a first
    query must share a content word with the question; a later one may be about what only the passages name.
    """
    if repeats(query, earlier):
        return False
    words, passages = content_words(query), golden_passages(question)
    if not passages and earlier:
        return bool(words)
    known = content_words(question.question).union(
        *(content_words(f"{p['title']} {p['text']}") for p in passages if p["id"] not in missing)
    )
    titles = [content_words(_QUALIFIER.sub("", p["title"])) for p in passages if p["id"] in missing]
    names = [name for title in titles if (name := title & known)]
    if not names:
        return bool(words & known)
    return any(2 * len(words & name) > len(name) for name in names)


@dataclass(frozen=True)
class HackingFlags:
    """What the checks found: None where one does not apply, as none does to an episode that failed.

    `without_evidence`: the answer is correct, but not all the evidence was retrieved; so it was guessed or
    known. Of correct episodes only.
    `repeats_question`: a query is the question itself. Of episodes with a search only.
    `several_answers`: the model opened more than one `<answer>`.
    """

    without_evidence: bool | None = None
    repeats_question: bool | None = None
    several_answers: bool | None = None


def hacking_flags(episode: Episode, question: Question, turns: list[str]) -> HackingFlags:
    """Check an episode; `turns` is what the model wrote."""
    if episode.outcome is Outcome.FAILED:
        return HackingFlags()
    queries = [search.query for search in episode.searches]
    return HackingFlags(
        bool(missing_evidence(question, episode.searches)) if episode.correct else None,
        any(repeats(query, [question.question]) for query in queries) if queries else None,
        len(answer_attempts(turns)) > 1,
    )


class Failure(StrEnum):
    """Capabilities in the order of an episode: act, go on searching, ask, find, use, answer in form."""

    NO_ACTION = "no_action"
    STOPPED_EARLY = "stopped_early"
    BAD_QUERY = "bad_query"
    EVIDENCE_NOT_FOUND = "evidence_not_found"
    EVIDENCE_NOT_USED = "evidence_not_used"
    ANSWER_FORMAT = "answer_format"


SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("question_id", pa.string()),
        ("outcome", pa.string()),
        ("first_failure", pa.string()),
        ("without_evidence", pa.bool_()),
        ("repeats_question", pa.bool_()),
        ("several_answers", pa.bool_()),
    ]
)


def diagnose(
    episodes: list[Episode], questions: Mapping[tuple[str, str], Question], decode: Decode
) -> pa.Table:
    """Diagnose every episode: a row each, in order, with nulls where a column does not apply.

    `questions` are keyed by data set and id.
    """
    rows = []
    for episode in episodes:
        question = questions[episode.dataset, episode.question_id]
        turns = episode.turn_texts(decode)
        row = {
            "dataset": episode.dataset,
            "question_id": episode.question_id,
            "outcome": episode.outcome,
            "first_failure": first_failure(episode, question, turns),
        }
        rows.append(row | vars(hacking_flags(episode, question, turns)))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def first_failure(episode: Episode, question: Question, turns: list[str]) -> Failure | None:
    """Find the first failure that the wrong answer depends on; None for an episode that is not wrong.

    An answer whose content is right depends on nothing but its form, whatever happened before. `turns` is
    what the model wrote.
    """
    if episode.outcome is not Outcome.WRONG:
        return None
    if _content_is_right(episode, turns):
        return Failure.ANSWER_FORMAT
    if not episode.searches and episode.ending is not Ending.ANSWERED:
        return Failure.NO_ACTION
    missing = missing_evidence(question, episode.searches)
    return _search_failure(episode, question, turns, missing) if missing else _answer_failure(episode, turns)


def _content_is_right(episode: Episode, turns: list[str]) -> bool:
    """Test whether an answer, complete or not, has a golden answer as whole words in it."""
    attempts = [*answer_attempts(turns), episode.prediction or ""]
    golden = [words for answer in episode.golden_answers if (words := normalize(answer))]
    return any(stands_in(words, normalize(attempt)) for attempt in attempts for words in golden)


def _search_failure(
    episode: Episode, question: Question, turns: list[str], missing: frozenset[str]
) -> Failure:
    """Find the first failure where evidence is missing.

    Failures that a later search made good are none: those that failed are the searches after the last one
    that found something needed.
    """
    queries = [search.query for search in episode.searches]
    gains = new_evidence(question, episode.searches)
    fruitless = range(1 + max((i for i, gain in enumerate(gains) if gain), default=-1), len(queries))
    if any(is_sensible(queries[i], question, queries[:i], missing) for i in fruitless):
        return Failure.EVIDENCE_NOT_FOUND
    if fruitless:
        return Failure.BAD_QUERY
    if episode.ending is Ending.ANSWERED:
        return Failure.STOPPED_EARLY
    # every search found something: turns without an action took the others' place, or there were too few
    return Failure.NO_ACTION if _ends_without_action(turns) else Failure.EVIDENCE_NOT_FOUND


def _answer_failure(episode: Episode, turns: list[str]) -> Failure:
    """Find the first failure where all evidence was retrieved, and no answer has the right content."""
    if episode.ending is Ending.ANSWERED:
        return Failure.EVIDENCE_NOT_USED
    if answer_attempts(turns[-1:]):  # empty or never closed: nothing could be read from it
        return Failure.ANSWER_FORMAT
    return Failure.NO_ACTION if _ends_without_action(turns) else Failure.EVIDENCE_NOT_USED


def _ends_without_action(turns: list[str]) -> bool:
    return not turns or parse_action(turns[-1]).kind is ActionKind.INVALID
