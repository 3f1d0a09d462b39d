"""Retrieval beside others: the same work, and what is said of it."""

from pathlib import Path

import pytest

from benchmarks.peer_retrieval import Bm25s, Lexical, OurBm25, agreement, make_texts_and_queries, recall


def test_our_rankings_are_those_of_bm25s_but_for_ties(tmp_path: Path) -> None:
    """Lucene's formula, by another project; with the same terms."""
    pytest.importorskip("bm25s")
    make_texts_and_queries(tmp_path, 400)
    contenders: list[Lexical] = [OurBm25(tmp_path), Bm25s(tmp_path)]
    for contender in contenders:
        contender.build()
    ours, theirs = (contender.search(range(60)) for contender in contenders)
    assert agreement(ours, theirs) == recall(ours, theirs) == 1.0


def test_recall_counts_what_scores_as_much_and_agreement_what_differs() -> None:
    exact = [[3.0, 2.0, 1.0], [9.0, 9.0, 9.0]]
    assert recall([[3.0, 2.0, 1.0], [9.0, 9.0, 8.0]], exact) == pytest.approx(5 / 6)
    assert agreement([[3.0, 2.0, 1.0], [9.0, 9.0, 8.0]], exact) == 0.5
