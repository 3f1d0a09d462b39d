"""The queue before the agent: one episode at a time, on a thread of its own, for an event loop in another."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from dgpo_core.errors import InfrastructureError
from dgpo_core.serving.events import AgentRequest, EpisodeCancelled, EpisodeEnd, Event, QueuePosition

if TYPE_CHECKING:  # the service listens while torch and transformers are imported
    from dgpo_core.serving.agent import Agent

POLL = 0.25  # seconds between two looks whether the client is still there


class NotReady(Exception):
    """Model and index are still being loaded, or the service is ending."""


class QueueFull(Exception):
    """No further request may wait."""


class RequestQueue:
    """Loads the agent on its thread, then runs requests in order; at most `limit` of them may wait.

    Everything but the episodes runs on the event loop's thread.
    """

    def __init__(self, limit: int) -> None:
        self.agent: Agent | None = None
        self._limit = limit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="agent")
        self._requests: list[QueuedRequest] = []
        self._closed = False

    async def open(self, load: Callable[[], "Agent"]) -> None:
        """Load the agent. Raises what `load` raises."""
        self.agent = await asyncio.get_running_loop().run_in_executor(self._thread, load)

    @property
    def waiting(self) -> int:
        """Return the number of requests behind the one that runs."""
        return max(0, len(self._requests) - 1)

    def submit(self, request: AgentRequest) -> "QueuedRequest":
        """Put a request at the end. Raises NotReady, and QueueFull when `limit` are waiting."""
        agent = self.agent
        if agent is None or self._closed:
            raise NotReady
        if len(self._requests) > self._limit:
            raise QueueFull
        loop = asyncio.get_running_loop()
        queued = QueuedRequest(request, loop)
        self._requests.append(queued)
        queued.set_ahead(len(self._requests) - 1)
        queued.work = self._thread.submit(_run, agent, queued)
        queued.work.add_done_callback(lambda _: _call_soon(loop, self._remove, queued))
        return queued

    def close(self) -> None:
        """Cancel all episodes at their next token, and take no more requests."""
        self._closed = True
        for queued in list(self._requests):
            queued.cancel()

    def shutdown(self) -> None:
        """Close, wait for the thread, and let the agent go."""
        self.close()
        self._thread.shutdown(wait=True)
        self.agent = None

    def _remove(self, queued: "QueuedRequest") -> None:
        self._requests.remove(queued)
        for ahead, other in enumerate(self._requests):
            other.set_ahead(ahead)


class QueuedRequest:
    """One client's request, waiting or running."""

    def __init__(self, request: AgentRequest, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.work: Future[None] | None = None
        self._loop = loop
        self._cancelled = threading.Event()
        self._items: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._ahead = 0

    def put(self, item: Event | Exception) -> None:
        """Hand an event, or what went wrong, to whoever reads `events`; from any thread."""
        _call_soon(self._loop, self._items.put_nowait, item)

    def set_ahead(self, ahead: int) -> None:
        """Tell the client its new place; from the event loop's thread."""
        if ahead != self._ahead:
            self._ahead = ahead
            self._items.put_nowait(QueuePosition(ahead=ahead))

    def cancel(self) -> None:
        """End the episode at its next token, or before it begins."""
        self._cancelled.set()
        if self.work is not None and self.work.cancel():
            self.put(EpisodeCancelled())

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    async def events(self, is_disconnected: Callable[[], Awaitable[bool]]) -> AsyncGenerator[Event, None]:
        """Yield the events, the last one EpisodeEnd. Raises what the episode raised.

        Raises InfrastructureError for an episode that failed, and EpisodeCancelled when the client has
        disconnected. Whoever stops reading ends the episode.
        """
        look = time.monotonic()
        try:
            while True:
                if time.monotonic() >= look:
                    look = time.monotonic() + POLL
                    if await is_disconnected():
                        raise EpisodeCancelled
                try:
                    async with asyncio.timeout(POLL):
                        item = await self._items.get()
                except TimeoutError:
                    continue
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, EpisodeEnd):
                    return
        finally:
            self.cancel()


def _run(agent: "Agent", queued: QueuedRequest) -> None:
    """Run an episode on the queue's thread; what it raises concerns its own client only."""
    try:
        if queued.cancelled:
            raise EpisodeCancelled
        record = agent.ask(queued.request, queued.put, lambda: queued.cancelled)
        if record.failure is not None:  # it has no answer, not even none
            raise InfrastructureError(record.failure)
        queued.put(EpisodeEnd(episode=record))
    except Exception as error:
        queued.put(error)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    with suppress(RuntimeError):  # the event loop has ended, and nobody listens
        loop.call_soon_threadsafe(function, *arguments)
