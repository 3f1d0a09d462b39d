"""Episodes as one row of metrics a question."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dgpo_core.agent.answers import contains_answer, token_f1
from dgpo_core.agent.episode import Episode


def question_table(episodes: list[Episode]) -> pa.Table:
    """The columns that reports and paired tests read; rows in the episodes' order."""
    return pa.Table.from_pylist([_row(episode) for episode in episodes])


def write_question_table(path: Path, episodes: list[Episode]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(question_table(episodes), path, compression="zstd")


def _row(episode: Episode) -> dict[str, object]:
    return {
        "dataset": episode.dataset,
        "question_id": episode.question_id,
        "question": episode.question,
        "golden_answers": episode.golden_answers,
        "prediction": episode.prediction,
        "outcome": str(episode.outcome),
        "em": episode.correct,
        "f1": token_f1(episode.prediction, episode.golden_answers),
        "sub_em": contains_answer(episode.prediction, episode.golden_answers),
        "hit": episode.hit,
        "searches": len(episode.searches),
        "generations": episode.generations,
        "well_formed": episode.well_formed,
        "invalid_actions": episode.invalid_actions,
        "cut_turns": episode.cut_turns,
        "ending": str(episode.ending),
        "model_tokens": episode.model_tokens,
    }
