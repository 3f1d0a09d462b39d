"""Concurrent searches in common batches: whatever waits while one batch is searched makes up the next."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from dgpo_core.errors import UserError
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
        """Return what the retriever finds. Raise what it raises, but no UserError about others' queries."""
        request = _Request(queries, top_k, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await request.answer

    async def _work(self) -> None:
        while self._waiting:
            await self._answer(self._next())

    async def _answer(self, batch: list[_Request]) -> None:
        queries = [query for request in batch for query in request.queries]
        search = partial(self._retriever.search, queries, batch[0].top_k)
        started = time.perf_counter()
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, search)
        except Exception as error:
            if isinstance(error, UserError) and len(batch) > 1:  # one of them is at fault, not the index
                for request in batch:
                    await self._answer([request])
                return
            for request in batch:
                if not request.answer.done():
                    request.answer.set_exception(error)
            return
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
