"""What one client may take of a service: connections, time, bytes and requests.

uvicorn waits for ever for a request's head, its body and a client that reads nothing. The head's size is
bounded by h11, its parser in Python.
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Collection
from http import HTTPStatus
from typing import Any

import uvicorn
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15  # for a request's head, from the connection or the last answer on; clients keep one for 5
BODY_SECONDS = 30.0  # for its body
READ_SECONDS = 30.0  # in which a client must read something of an answer that is ready
HELD_BYTES = 256 * 2**20  # of the bodies of all requests together
CONNECTIONS = 500  # half of the files that a process may have open where nobody has raised that
ADDRESSES = 10_000  # whose requests are counted

Refusal = Callable[[str, str], dict[str, Any]]  # message and code -> the body of an error


def server_config(app: ASGIApp, grace: int, lifespan: Any = "off") -> uvicorn.Config:
    """Return how our services run under uvicorn; `grace` are seconds for the last requests at the end."""
    return uvicorn.Config(
        app,
        http=TimedProtocol,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=HEAD_SECONDS,
        timeout_graceful_shutdown=grace,
        lifespan=lifespan,
        ws="none",
    )


class TimedProtocol(H11Protocol):
    """Speaks HTTP with clients that keep up; drops those that do not.

    Beyond CONNECTIONS the one that has waited longest without a request makes room: who asks at once is
    served however many connections somebody else holds.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._watch_head()
        if len(self.connections) > CONNECTIONS:
            idle = [other for other in self.connections if not other.asked]  # type: ignore[union-attr]
            min(idle, key=lambda other: other._since).transport.abort()  # type: ignore[union-attr]

    @property
    def asked(self) -> bool:
        """Return whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._since = self.loop.time()
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in filter(None, (self._head, self._unread)):
            timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _watch_head(self) -> None:
        """Begin to wait for a request's head, or end it when there is a request."""
        if self.asked and self._head is not None:
            self._head.cancel()
            self._head = None
        elif not self.asked and self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)


class BodyFilter:
    """Refuses requests of more than `largest` bytes, or whose body does not come in BODY_SECONDS.

    What is behind it gets the body in one piece.
    """

    def __init__(self, app: ASGIApp, largest: int, refusal: Refusal) -> None:
        self._app, self._largest, self._refusal = app, largest, refusal
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            refused = await self._read(body, scope, receive)
            if refused is None:
                await self._app(scope, _replay(body, receive), send)
            else:
                await refused(scope, receive, send)
        finally:
            self._held -= len(body)

    async def _read(self, body: bytearray, scope: Scope, receive: Receive) -> JSONResponse | None:
        """Read the body, or say why it is not read. Of a client that leaves meanwhile it is what came."""
        size, more = int(Headers(scope=scope).get("content-length", "0")[:20]), True  # h11 takes digits only
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more and size <= self._largest and self._held <= HELD_BYTES:
                    message = await receive()
                    body += message.get("body", b"")
                    self._held += len(message.get("body", b""))
                    size, more = max(size, len(body)), message.get("more_body", False)
        except TimeoutError:
            return self._refuse(408, f"the body did not come within {BODY_SECONDS:g} seconds", "slow_body")
        if size > self._largest:
            return self._refuse(413, f"a request has at most {self._largest:,} bytes", "too_large")
        if more or self._held > HELD_BYTES:
            return self._refuse(429, "too many bytes at once; try again soon", "rate_limit")
        return None

    def _refuse(self, status: int, message: str, code: str) -> JSONResponse:
        again = {"Retry-After": "5"} if status == HTTPStatus.TOO_MANY_REQUESTS else {}
        return JSONResponse(self._refusal(message, code), status, {"Connection": "close", **again})


def _replay(body: bytearray, receive: Receive) -> Receive:
    """Return a channel that gives the body in one message, and then what else comes."""
    whole = [bytes(body)]

    async def replay() -> Message:
        return {"type": "http.request", "body": whole.pop(), "more_body": False} if whole else await receive()

    return replay


class RateFilter:
    """Refuses an address's requests beyond `rate` a minute with 429; as many may come at once after a rest.

    Paths in `exempt` are not counted. Addresses that have not asked for longest are forgotten.
    """

    def __init__(self, app: ASGIApp, rate: int, refusal: Refusal, exempt: Collection[str] = ()) -> None:
        self._app, self._rate, self._refusal, self._exempt = app, rate, refusal, exempt
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, at which time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._exempt:
            await self._app(scope, receive, send)
            return
        wait = self.taken((scope.get("client") or ("",))[0], asyncio.get_running_loop().time())
        if wait > 0:
            message = f"more than {self._rate} requests a minute; try again in {wait:.0f} seconds"
            headers = {"Retry-After": str(math.ceil(wait))}
            await JSONResponse(self._refusal(message, "rate_limit"), 429, headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def taken(self, address: str, now: float) -> float:
        """Take one request of an address, and return 0; or the seconds to wait where none is left."""
        left, then = self._left.pop(address, (float(self._rate), now))
        left = min(self._rate, left + (now - then) * self._rate / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self._rate
        self._left[address] = (left if wait else left - 1, now)
        if len(self._left) > ADDRESSES:
            self._left.popitem(last=False)
        return wait
