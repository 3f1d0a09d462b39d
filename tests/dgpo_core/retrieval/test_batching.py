"""Requests that wait become one search; each gets its own part of the answer, or the failure."""

import asyncio
from typing import Any

import pytest

from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval.index import Index, index_passages
from dgpo_core.retrieval.ranking import Hit
from dgpo_core.retrieval.service import Batcher
from tests.dgpo_core.retrieval.conftest import BM25


def searched(
    index: Index, requests: list[tuple[list[str], int]], largest: int
) -> tuple[list[Any], list[int]]:
    """The answers of requests that come at once (exceptions as they are), and the searches' sizes."""
    sizes: list[int] = []

    async def run() -> list[Any]:
        batcher = Batcher(index, largest, lambda queries, seconds: sizes.append(queries))
        answers = await asyncio.gather(*(batcher.search(*r) for r in requests), return_exceptions=True)
        assert batcher.waiting == 0
        batcher.close()
        return list(answers)

    return asyncio.run(run()), sizes


def test_batches_hold_what_fits_and_wants_as_many_passages(
    index: Index, queries: list[tuple[str, str]]
) -> None:
    asked = [query for query, _ in queries[:12]]
    requests = [(asked[0:1], 3), (asked[1:3], 3), (asked[3:4], 2), (asked[4:11], 3), (asked[11:], 3), ([], 3)]
    answers, sizes = searched(index, requests, largest=4)
    assert answers == [index.search(some, top_k) for some, top_k in requests]
    assert sizes == [1 + 2 + 1, 1, 7], "the oldest first; seven are more than fit, and go alone"


def test_a_failure_is_everybodys_and_the_next_search_is_another(passages: list[Passage]) -> None:
    broken = index_passages(passages[:20], BM25)
    broken.close()
    answers, sizes = searched(broken, [(["a"], 3), (["b"], 3)], largest=4)
    assert [type(answer) for answer in answers] == [InfrastructureError] * 2
    assert sizes == []


def test_one_clients_fault_is_its_own(index: Index, queries: list[tuple[str, str]]) -> None:
    good = [queries[0][0]]
    answers, _ = searched(index, [(good, 3), (["town \ud800"], 3), (["film"], 3), (good, 3)], largest=9)
    assert isinstance(answers[1], UserError)
    assert "not valid Unicode" in str(answers[1])
    assert [answers[0], answers[2], answers[3]] == [index.search(q, 3) for q in (good, ["film"], good)]


def test_a_client_that_leaves_disturbs_nobody(index: Index, queries: list[tuple[str, str]]) -> None:
    async def run() -> list[list[Hit]]:
        batcher = Batcher(index, 8, lambda queries, seconds: None)
        leaving = asyncio.create_task(batcher.search([queries[0][0]], 3))
        staying = asyncio.create_task(batcher.search([queries[1][0]], 3))
        await asyncio.sleep(0)
        leaving.cancel()
        found = await staying
        with pytest.raises(asyncio.CancelledError):
            await leaving
        batcher.close()
        return found

    assert asyncio.run(run()) == index.search([queries[1][0]], 3)
