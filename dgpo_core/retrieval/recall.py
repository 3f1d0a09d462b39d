"""How much of what an exact search finds the finished index finds too."""

from dgpo_core.config.retrieval import RetrievalConfig
from dgpo_core.errors import UserError
from dgpo_core.retrieval.index import Searcher


def search_recall(searcher: Searcher, queries: list[str], top_k: int) -> float:
    """Mean share of the exact best `top_k` passages that are among the found ones; nan without queries.

    Queries for which the exact search finds nothing are left out.
    """
    found, exact = (searcher.search(queries, top_k, exact=exactly) for exactly in (False, True))
    shares = [
        len({p.number for p in first} & {p.number for p in best}) / len(best)
        for first, best in zip(found, exact, strict=True)
        if best
    ]
    return sum(shares) / len(shares) if shares else float("nan")


def require_recall(measured: float, config: RetrievalConfig) -> None:
    """Raises UserError, with what to raise, when the measured recall is below `config.min_recall`."""
    if measured < config.min_recall:
        stronger = {"binary": ", or retrieval.qdrant.quantization: int8", "int8": ", or none", "none": ""}
        raise UserError(
            f"retrieval.min_recall: recall@{config.top_k} against exact search is {measured:.4f}, below "
            f"{config.min_recall}; raise retrieval.qdrant.hnsw_ef or .oversampling (searches take longer), "
            f"then .hnsw_m and .hnsw_ef_construct (builds anew){stronger[config.qdrant.quantization]}"
        )
