"""What stages and commands take from other stages: models by name, and the index, opened for searching."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dgpo_core.config.params import PARAMS, Params
from dgpo_core.config.recipes import STUDENT, TEACHER
from dgpo_core.datasets.records import read_questions
from dgpo_core.errors import UserError
from tasks.project.paths import INDEX, MODELS, questions_file
from tasks.project.progress import Reporter

if TYPE_CHECKING:  # it needs torch, which takes seconds to import; a model's name needs neither
    from dgpo_core.retrieval.index import Index, Recall, Searcher


def model_source(params: Params, model: str) -> str:
    """Return folder or hub name of `student`, `teacher` or a recipe. Raise UserError for an unknown name."""
    if model in (STUDENT, TEACHER):
        return str(getattr(params.models, model))
    if model not in params.recipes.all:
        raise UserError(f"{PARAMS}: recipes has no {model!r}, only {sorted(params.recipes.all)}")
    return str(MODELS / model)


def local(source: str) -> list[Path]:
    """Return the model as an input if it is a folder; one on the hub is pinned by its name."""
    return [Path(source)] if Path(source).is_dir() else []


def require_episodes(count: int, what: str, advice: str = "") -> None:
    """Raise UserError when a stage has nothing to learn from; `advice` is what to do about it."""
    if count == 0:
        raise UserError(f"there are no {what}: nothing to train on" + (f"; {advice}" if advice else ""))


def retriever(
    params: Params, folder: Path = INDEX, accept: Callable[["Searcher"], None] | None = None
) -> "Index":
    """Open the pipeline's index. Where a server lacks its collection, make that now and show the progress.

    A new collection is given to `accept`, by default to one that raises UserError when its recall is below
    retrieval.min_recall.
    """
    from dgpo_core.retrieval.index import open_index

    reporter = Reporter("retriever")

    def progress(done: int, total: int, what: str) -> None:
        reporter.update(done, total, doing=what)

    def by_recall(searcher: "Searcher") -> None:
        measured_recall(params, searcher)

    try:
        return open_index(folder, params.retrieval, progress, accept or by_recall)
    finally:
        reporter.close()


def measured_recall(params: Params, searcher: "Searcher") -> "Recall | None":
    """Measure the recall of the top k against exact search, on validation questions of all training sets.

    Raise UserError when it is too low. None where retrieval.recall_queries is 0.
    """
    from dgpo_core.retrieval.index import require_recall, search_recall

    if not params.retrieval.recall_queries:
        return None
    measured = search_recall(searcher, validation_questions(params), params.retrieval.top_k)
    require_recall(measured, params.retrieval)
    return measured


def validation_questions(params: Params) -> list[str]:
    """Return the questions that an index is measured by, at least one of each training set."""
    each = max(1, math.ceil(params.retrieval.recall_queries / len(params.questions.train)))
    files = [questions_file(name, "dev") for name in params.questions.train]
    return [question.question for file in files for question in read_questions(file)[:each]]
