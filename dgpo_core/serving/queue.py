"""Who asks is served in order: one episode at a time on a thread of its own, for an event loop in another."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from dgpo_core.serving.events import Ask, Event, Finished, Stopped, Waiting

if TYPE_CHECKING:  # the service listens while torch and transformers are imported
    from dgpo_core.serving.agent import Agent

POLL = 0.25  # seconds between two looks whether the client is still there


class NotReady(Exception):
    """Model and index are still being loaded, or the service is ending."""


class Busy(Exception):
    """As many as may wait are waiting."""


class Visit:
    """One client's episode, waiting or under way."""

    def __init__(self, ask: Ask, loop: asyncio.AbstractEventLoop) -> None:
        self.ask = ask
        self.work: Future[None] | None = None
        self._loop = loop
        self._stop = threading.Event()
        self._queue: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._ahead = 0

    def put(self, item: Event | Exception) -> None:
        """An event, or what went wrong; from any thread."""
        with suppress(RuntimeError):  # the event loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def tell_ahead(self, ahead: int) -> None:
        if ahead != self._ahead:
            self._ahead = ahead
            self._queue.put_nowait(Waiting(ahead=ahead))

    def leave(self) -> None:
        """The episode ends at its next token, or never begins."""
        self._stop.set()
        if self.work is not None and self.work.cancel():
            self.put(Stopped())

    @property
    def left(self) -> bool:
        return self._stop.is_set()

    async def events(self, gone: Callable[[], Awaitable[bool]]) -> AsyncGenerator[Event, None]:
        """The events, the last one Finished. Raises what the episode raised.

        Raises Stopped when the client is `gone`. Whoever stops reading ends the episode.
        """
        look = time.monotonic()
        try:
            while True:
                if time.monotonic() >= look:
                    look = time.monotonic() + POLL
                    if await gone():
                        raise Stopped
                try:
                    async with asyncio.timeout(POLL):
                        item = await self._queue.get()
                except TimeoutError:
                    continue
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Finished):
                    return
        finally:
            self.leave()


class Desk:
    """Loads the agent on its thread with `open`; then serves visits in order, `limit` of which may wait.

    Everything but the episodes runs on the event loop's thread.
    """

    def __init__(self, limit: int) -> None:
        self.agent: Agent | None = None
        self._limit = limit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="agent")
        self._line: list[Visit] = []
        self._closed = False

    async def open(self, load: Callable[[], "Agent"]) -> None:
        """Raises what `load` raises."""
        self.agent = await asyncio.get_running_loop().run_in_executor(self._thread, load)

    @property
    def waiting(self) -> int:
        """Visits behind the one that is served."""
        return max(0, len(self._line) - 1)

    def admit(self, ask: Ask) -> Visit:
        """Raises NotReady, and Busy when `limit` are waiting."""
        agent = self.agent
        if agent is None or self._closed:
            raise NotReady
        if len(self._line) > self._limit:
            raise Busy
        loop = asyncio.get_running_loop()
        visit = Visit(ask, loop)
        self._line.append(visit)
        visit.tell_ahead(len(self._line) - 1)
        visit.work = self._thread.submit(_serve, agent, visit)
        visit.work.add_done_callback(lambda _: self._soon(loop, visit))
        return visit

    def close(self) -> None:
        """End all episodes at their next token, and admit no more."""
        self._closed = True
        for visit in list(self._line):
            visit.leave()

    def shut(self) -> None:
        """Wait for the thread and let the agent go; call `close` before."""
        self._thread.shutdown(wait=True)
        self.agent = None

    def _soon(self, loop: asyncio.AbstractEventLoop, visit: Visit) -> None:
        with suppress(RuntimeError):  # as in Visit.put
            loop.call_soon_threadsafe(self._depart, visit)

    def _depart(self, visit: Visit) -> None:
        self._line.remove(visit)
        for ahead, other in enumerate(self._line):
            other.tell_ahead(ahead)


def _serve(agent: "Agent", visit: Visit) -> None:
    """On the desk's thread: what an episode raises is its visitor's business."""
    try:
        if visit.left:
            raise Stopped
        visit.put(Finished(episode=agent.ask(visit.ask, visit.put, lambda: visit.left)))
    except Exception as error:
        visit.put(error)
