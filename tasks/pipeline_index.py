"""The index that the pipeline made, for whoever searches it."""

import math
from collections.abc import Callable
from pathlib import Path

from dgpo_core.config.params import Params
from dgpo_core.datasets.records import read_questions
from dgpo_core.retrieval.index import Index, Searcher, open_index
from dgpo_core.retrieval.recall import require_recall, search_recall
from tasks.paths import INDEX, questions_file
from tasks.progress import Reporter


def retriever(
    params: Params, folder: Path = INDEX, accept: Callable[[Searcher], None] | None = None
) -> Index:
    """The pipeline's index. Where a server lacks its collection, that is made now, and its progress is shown.

    A new collection is given to `accept`, by default to one that raises UserError when its recall is below
    retrieval.min_recall.
    """
    reporter = Reporter("retriever")

    def progress(done: int, total: int, what: str) -> None:
        reporter.update(done, total, doing=what)

    def by_recall(searcher: Searcher) -> None:
        require_recall(measured_recall(params, searcher), params.retrieval)

    try:
        return open_index(folder, params.retrieval, progress, accept or by_recall)
    finally:
        reporter.close()


def measured_recall(params: Params, searcher: Searcher) -> float:
    """Of the top k against exact search, on validation questions of all training sets; nan without any."""
    each = math.ceil(params.retrieval.recall_queries / len(params.questions.train))
    files = [questions_file(name, "dev") for name in params.questions.train]
    sample = [question.question for file in files for question in read_questions(file)[:each]]
    return search_recall(searcher, sample, params.retrieval.top_k)
