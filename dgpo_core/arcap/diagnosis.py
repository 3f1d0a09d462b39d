"""Why an episode is wrong: which capability failed first (beyond the paper; docs/method.md, "Diagnosis")."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

import pyarrow as pa

from dgpo_core.arcap.evidence import missing_evidence, new_evidence
from dgpo_core.arcap.hacking import HackingFlags, hacking_flags
from dgpo_core.arcap.queries import is_sensible
from dgpo_core.arcap.turns import Decode, answer_attempts, model_turns
from dgpo_core.datasets.records import Question
from dgpo_core.protocol.actions import ActionKind, parse_action
from dgpo_core.protocol.episode import Ending, Episode, Outcome
from dgpo_core.scoring.answers import normalize
from dgpo_core.text import stands_in


class Failure(StrEnum):
    """In the order of an episode: to act, to go on searching, to ask, to find, to use, to answer in form."""

    NO_ACTION = "no_action"
    STOPPED_EARLY = "stopped_early"
    BAD_QUERY = "bad_query"
    EVIDENCE_NOT_FOUND = "evidence_not_found"
    EVIDENCE_NOT_USED = "evidence_not_used"
    ANSWER_FORMAT = "answer_format"


@dataclass(frozen=True)
class Diagnosis:
    """One question's; `first_failure` is None unless the outcome is wrong."""

    dataset: str
    question_id: str
    outcome: Outcome
    first_failure: Failure | None
    flags: HackingFlags


def diagnose(
    episodes: list[Episode], questions: Mapping[tuple[str, str], Question], decode: Decode
) -> list[Diagnosis]:
    """One diagnosis an episode, in order; `questions` are keyed by data set and id."""
    found = []
    for episode in episodes:
        question = questions[episode.dataset, episode.question_id]
        turns = model_turns(episode, decode)
        found.append(
            Diagnosis(
                episode.dataset,
                episode.question_id,
                episode.outcome,
                first_failure(episode, question, turns),
                hacking_flags(episode, question, turns),
            )
        )
    return found


def first_failure(episode: Episode, question: Question, turns: list[str]) -> Failure | None:
    """The first capability whose failure the wrong answer depends on; None for an episode that is not wrong.

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
    """Whether an answer, complete or not, has a golden answer as whole words in it."""
    attempts = [*answer_attempts(turns), episode.prediction or ""]
    golden = [words for answer in episode.golden_answers if (words := normalize(answer))]
    return any(stands_in(words, normalize(attempt)) for attempt in attempts for words in golden)


def _search_failure(
    episode: Episode, question: Question, turns: list[str], missing: frozenset[str]
) -> Failure:
    """Evidence is missing. Earlier failures that a later search made good are none: the last searches,
    after the last one that found something needed, are those that failed."""
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
    """All evidence was retrieved, and no answer has the right content."""
    if episode.ending is Ending.ANSWERED:
        return Failure.EVIDENCE_NOT_USED
    if answer_attempts(turns[-1:]):  # empty or never closed: nothing could be read from it
        return Failure.ANSWER_FORMAT
    return Failure.NO_ACTION if _ends_without_action(turns) else Failure.EVIDENCE_NOT_USED


def _ends_without_action(turns: list[str]) -> bool:
    return not turns or parse_action(turns[-1]).kind is ActionKind.INVALID


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


def as_table(diagnoses: list[Diagnosis]) -> pa.Table:
    """One row a question; null where a column does not apply."""
    rows = []
    for diagnosis in diagnoses:
        row = asdict(diagnosis)
        rows.append(row | row.pop("flags"))
    return pa.Table.from_pylist(rows, schema=SCHEMA)
