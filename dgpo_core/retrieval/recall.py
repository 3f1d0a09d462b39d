"""How much of what an exact search finds the finished index finds too."""

from dataclasses import dataclass

from dgpo_core.config.retrieval import RetrievalConfig
from dgpo_core.errors import UserError
from dgpo_core.retrieval.index import Searcher


@dataclass(frozen=True)
class Recall:
    """`share`: mean share of the exact best passages that were found, None where no query finds any.

    `silent` of the `queries` find nothing, whatever the search.
    """

    share: float | None
    queries: int
    silent: int


def search_recall(searcher: Searcher, queries: list[str], top_k: int) -> Recall:
    """Measure the best `top_k` passages of `queries`, without those that find nothing in an exact search."""
    found, exact = (searcher.search(queries, top_k, exact=exactly) for exactly in (False, True))
    shares = [
        len({p.number for p in first} & {p.number for p in best}) / len(best)
        for first, best in zip(found, exact, strict=True)
        if best
    ]
    share = sum(shares) / len(shares) if shares else None
    return Recall(share, len(queries), len(queries) - len(shares))


def require_recall(measured: Recall, config: RetrievalConfig) -> None:
    """Raise UserError when the measured recall is below `config.min_recall`, or of no query at all."""
    if measured.share is None:
        raise UserError(
            f"retrieval.encoder: {measured.silent} of {measured.queries} validation questions find nothing: "
            "the corpus has none of their words. BM25 knows the forms of English words and of no other "
            "language: a dense encoder of that language may find more (kind: dense); recall_queries: 0 does "
            "not ask"
        )
    if not measured.share >= config.min_recall:
        stronger = {"binary": ", or retrieval.qdrant.quantization: int8", "int8": ", or none", "none": ""}
        raise UserError(
            f"retrieval.min_recall: recall@{config.top_k} against exact search is {measured.share:.4f}, "
            f"below {config.min_recall}; raise retrieval.qdrant.hnsw_ef or .oversampling (searches take "
            "longer), then .hnsw_m and .hnsw_ef_construct (builds anew)"
            f"{stronger[config.qdrant.quantization]}"
        )
