"""Concurrent searches in common batches: whatever waits while one batch is searched makes up the next."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dgpo_core.retrieval.hits import Hit, Retriever


@dataclass
class _Request:
    queries: list[str]
    top_k: int
    answer: asyncio.Future[list[list[Hit]]]


class Batcher:
    """One search at a time, in a thread, of at most `largest` queries (or of one request that has more).

    Nothing waits for company: alone, a request is searched at once. `observe` is told the number of queries
    and the seconds of each search.
    """

    def __init__(self, retriever: Retriever, largest: int, observe: Callable[[int, float], None]) -> None:
        self._retriever, self._largest, self._observe = retriever, largest, observe
        self._waiting: deque[_Request] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Queries that wait for a search."""
        return sum(len(request.queries) for request in self._waiting)

    async def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """What the retriever finds; what it raises is raised for every request of the batch."""
        request = _Request(queries, top_k, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await request.answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._next()
            queries = [query for request in batch for query in request.queries]
            started = time.perf_counter()
            try:
                found = await loop.run_in_executor(
                    self._thread, self._retriever.search, queries, batch[0].top_k
                )
            except Exception as error:
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(error)
                continue
            self._observe(len(queries), time.perf_counter() - started)
            results = iter(found)
            for request in batch:
                own = [next(results) for _ in request.queries]
                if not request.answer.done():  # else: its client has left
                    request.answer.set_result(own)

    def _next(self) -> list[_Request]:
        """The oldest request and the others that want as many passages, as far as they fit."""
        first = self._waiting.popleft()
        batch, room, left = [first], self._largest - len(first.queries), deque[_Request]()
        for request in self._waiting:
            if request.top_k == first.top_k and len(request.queries) <= room:
                batch.append(request)
                room -= len(request.queries)
            else:
                left.append(request)
        self._waiting = left
        return batch

    def close(self) -> None:
        self._thread.shutdown(wait=False)
