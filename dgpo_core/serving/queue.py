"""The queue before the agent, whose episodes run together on one thread, for an event loop in another."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from dgpo_core.errors import InfrastructureError
from dgpo_core.serving.events import AgentRequest, EpisodeCancelled, EpisodeEnd, Event, QueuePosition

if TYPE_CHECKING:  # the service listens while torch and transformers are imported
    from dgpo_core.agent.episode import Episode
    from dgpo_core.agent.loop import RunningEpisodes
    from dgpo_core.serving.agent import Agent, Asked

POLL = 0.25  # seconds between two looks whether the client is still there


class NotReady(Exception):
    """Model and index are still being loaded, or the service is ending."""


class QueueFull(Exception):
    """No further request may wait."""


class RequestQueue:
    """Loads the agent on its thread, then runs requests there: they begin in order, `together` at a time.

    Further ones wait, at most `limit`. The lists belong to the event loop's thread, but for `_inbox`.
    """

    def __init__(self, limit: int, together: int = 1) -> None:
        self.agent: Agent | None = None
        self._loading: asyncio.Future[Agent] | None = None
        self._limit, self._together = limit, together
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="agent")
        self._records = ThreadPoolExecutor(max_workers=together, thread_name_prefix="record")
        self._requests: list[QueuedRequest] = []
        self._closed = False
        self._lock = threading.Lock()
        self._inbox: list[QueuedRequest] = []  # those that have not begun
        self._working = False

    async def open(self, load: Callable[[], "Agent"]) -> None:
        """Load the agent. Raises what `load` raises."""
        self._loading = asyncio.get_running_loop().run_in_executor(self._thread, load)
        self.agent = await self._loading

    async def loaded(self) -> "Agent":
        """Return the agent, when it is loaded. Raises what loading it raises, and NotReady before `open`."""
        if self._loading is not None:
            await asyncio.shield(self._loading)  # `open` gets it first
        if self.agent is None:
            raise NotReady
        return self.agent

    @property
    def waiting(self) -> int:
        """Return the number of requests that have not begun."""
        return max(0, len(self._requests) - self._together)

    @property
    def running(self) -> int:
        """Return the number of requests that are being answered."""
        return min(len(self._requests), self._together)

    def submit(self, request: AgentRequest) -> "QueuedRequest":
        """Put a request at the end. Raises NotReady, and QueueFull when `limit` are waiting."""
        if self.agent is None or self._closed:
            raise NotReady
        if len(self._requests) >= self._limit + self._together:
            raise QueueFull
        queued = QueuedRequest(request, asyncio.get_running_loop(), self._remove)
        self._requests.append(queued)
        queued.set_ahead(max(0, len(self._requests) - self._together))
        with self._lock:
            self._inbox.append(queued)
            if not self._working:
                self._working = True
                self._thread.submit(self._work, self.agent)
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
        self._records.shutdown(wait=True)
        self.agent = None

    def _remove(self, queued: "QueuedRequest") -> None:
        if queued in self._requests:
            self._requests.remove(queued)
        for place, other in enumerate(self._requests):
            other.set_ahead(max(0, place + 1 - self._together))

    def _work(self, agent: "Agent") -> None:
        """Run requests until there are none, on the queue's thread."""
        under_way: dict[int, tuple[QueuedRequest, Asked]] = {}
        while True:
            try:
                with agent.start() as running:
                    while self._begin(agent, running, under_way):
                        for task, result in running.advance():
                            queued, asked = under_way.pop(id(task))
                            # apart from the episodes: its record may have to search for unknown words
                            self._records.submit(_end, queued, agent, asked, result)
                    return
            except Exception as error:  # of all that were under way: a bug, or a model that gives no numbers
                for queued, _ in under_way.values():
                    queued.finish(error)
                under_way.clear()

    def _begin(
        self,
        agent: "Agent",
        running: "RunningEpisodes",
        under_way: "dict[int, tuple[QueuedRequest, Asked]]",
    ) -> bool:
        """Let waiting requests join; return False, once, when there is nothing to do."""
        with self._lock:
            room = self._together - len(under_way)
            begun, self._inbox = self._inbox[:room], self._inbox[room:]
            self._working = bool(begun or under_way)
            if not self._working:
                return False
        for queued in begun:
            try:
                asked = queued.begin(agent)
            except Exception as error:
                queued.finish(error)
                continue
            under_way[id(asked.task)] = queued, asked
            running.add([asked.task], asked.sampling)
        return True


def _end(queued: "QueuedRequest", agent: "Agent", asked: "Asked", result: "Episode | Exception") -> None:
    """Hand over what ends a request's events."""
    try:
        queued.finish(_outcome(agent, asked, result))
    except Exception as error:
        queued.finish(error)


def _outcome(agent: "Agent", asked: "Asked", result: "Episode | Exception") -> Event | Exception:
    """Return what ends a request's events."""
    if isinstance(result, Exception):
        return result
    if result.failure is not None:  # it has no answer, not even none
        return InfrastructureError(result.failure)
    return EpisodeEnd(episode=agent.record(asked, result))


class QueuedRequest:
    """One client's request, waiting or running; `removed` is called, once it is over, by the event loop."""

    def __init__(
        self,
        request: AgentRequest,
        loop: asyncio.AbstractEventLoop,
        removed: Callable[["QueuedRequest"], None],
    ) -> None:
        self.request = request
        self._loop, self._removed = loop, removed
        self._begun = self._cancelled = False
        self._items: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._ahead = 0

    def begin(self, agent: "Agent") -> "Asked":
        """Return the request as a task. Raises EpisodeCancelled, and UserError for an impossible one."""
        self._begun = True
        if self._cancelled:
            raise EpisodeCancelled
        return agent.begin(self.request, self.put, lambda: self._cancelled)

    def put(self, item: Event | Exception) -> None:
        """Hand an event, or what went wrong, to whoever reads `events`; from any thread."""
        _call_soon(self._loop, self._items.put_nowait, item)

    def finish(self, item: Event | Exception) -> None:
        """Hand over the last event, and give up the place; from any thread."""
        self.put(item)
        _call_soon(self._loop, self._removed, self)

    def set_ahead(self, ahead: int) -> None:
        """Tell the client its new place; from the event loop's thread."""
        if ahead != self._ahead:
            self._ahead = ahead
            self._items.put_nowait(QueuePosition(ahead=ahead))

    def cancel(self) -> None:
        """End the episode at its next token, or before it begins."""
        self._cancelled = True
        if not self._begun:
            self.finish(EpisodeCancelled())

    @property
    def cancelled(self) -> bool:
        return self._cancelled

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


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    with suppress(RuntimeError):  # the event loop has ended, and nobody listens
        loop.call_soon_threadsafe(function, *arguments)
