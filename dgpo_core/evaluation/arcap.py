"""The four measurements of ARCap, on any model (paper, section 5).

Source referencing and query rewriting use the data set that plays NQ's part, thinking both it and the one
that plays MuSiQue's.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import pyarrow as pa

from dgpo_core.agent import prompts
from dgpo_core.agent.episode import Episode, Outcome
from dgpo_core.agent.loop import Task, stable_seed
from dgpo_core.datasets.records import Question

FORCED_ANSWER = "<answer>"
Run = Callable[[list[Task], str], list[Episode]]  # (tasks, name of the measurement) -> episodes


@dataclass(frozen=True)
class ArcapValue:
    """One question's value in one measurement; `failed` values count nowhere."""

    measurement: str
    question_id: str
    value: float
    failed: bool


def gold_context(question: Question, role: str) -> list[tuple[str, str]]:
    """Return (title, text) of what a perfect search would find; empty where that is not known.

    For `nq` the annotated long answer, for `musique` all supporting paragraphs.
    """
    passages = question.metadata.get("golden_passages") or []
    if role == "nq" and (long_answers := question.metadata.get("long_answers")):
        titles = [passage["title"] for passage in passages if passage["text"] == long_answers[0]]
        return [(titles[0] if titles else "", long_answers[0])]
    return [(passage["title"], passage["text"]) for passage in passages]


def source_referencing(
    role: str, dataset: str, questions: list[Question], seed: int, run: Run, form: prompts.Documents = "plain"
) -> list[ArcapValue]:
    """Measure EM with the gold context given in `form`: in a forced answer, and with thinking and searching.

    Questions without a known gold context (docs/data.md, the join) are not asked.
    """
    contexts = [(question, gold_context(question, role)) for question in questions]
    rows = []
    for suffix, forced in (("", FORCED_ANSWER), ("_thinking", "")):
        name = f"source_em_{role}{suffix}"
        tasks = [
            Task(
                question,
                dataset,
                seed=(stable_seed(seed, name, question.id),),
                opening=prompts.information(context, form) + forced,
                single_turn=bool(forced),
            )
            for question, context in contexts
            if context
        ]
        rows += [_row(name, episode, float(episode.correct)) for episode in run(tasks, name)]
    return rows


def query_rewriting(role: str, episodes: list[Episode]) -> list[ArcapValue]:
    """Measure whether the *first* query's passages hold a golden answer; without a query they do not."""
    return [
        _row(f"query_hit_{role}", episode, float(bool(episode.searches) and episode.searches[0].hit))
        for episode in episodes
    ]


def thinking(role: str, episodes: list[Episode]) -> list[ArcapValue]:
    """Measure the final hit and the number of searches over whole episodes, from their structure."""
    return [
        row
        for episode in episodes
        for row in (
            _row(f"thinking_hit_{role}", episode, float(episode.hit)),
            _row(f"thinking_searches_{role}", episode, float(len(episode.searches))),
        )
    ]


def _row(measurement: str, episode: Episode, value: float) -> ArcapValue:
    return ArcapValue(measurement, episode.question_id, value, episode.outcome is Outcome.FAILED)


def as_table(rows: list[ArcapValue]) -> pa.Table:
    """Return the columns measurement, question_id, value and failed; no rows where nothing was measured."""
    types = [pa.string(), pa.string(), pa.float64(), pa.bool_()]
    names = [column.name for column in fields(ArcapValue)]
    return pa.Table.from_pylist([vars(row) for row in rows], pa.schema(zip(names, types, strict=True)))
