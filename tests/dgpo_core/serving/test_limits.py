"""What one client may take: connections, time, bytes and requests, over real sockets."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from dgpo_core.serving import limits
from dgpo_core.serving.access import openai_refusal, restrict
from dgpo_core.serving.limits import BodyFilter, RateFilter, server_config

LARGEST = 1000
HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
Address = tuple[str, int]


async def echo(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def large(_request: Request) -> Response:
    return Response(bytes(50_000_000))


@contextlib.contextmanager
def service(**restrictions: Any) -> Iterator[Address]:
    """Serve an application that tells how much it was sent; yield its address."""
    routes = [
        Route("/", echo, methods=["GET", "POST"]),
        Route("/health", echo),
        Route("/large", large),
    ]
    app = Starlette(routes=routes)
    app.add_middleware(BodyFilter, largest=LARGEST, refusal=openai_refusal)
    restrict(app, "127.0.0.1", **restrictions)
    server = uvicorn.Server(server_config(app, grace=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listening.getsockname()[:2]
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience of half a second, for tests that need it to end."""
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "READ_SECONDS"):
        monkeypatch.setattr(limits, name, 0.5)


def url(address: Address, path: str = "") -> str:
    return f"http://127.0.0.1:{address[1]}/{path}"


def rest(connection: socket.socket) -> bytes:
    """All that still comes until the other side ends the connection."""
    connection.settimeout(20)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


def answered(connection: socket.socket) -> bool:
    """Whether a body of 4 bytes was read; the connection stays."""
    connection.settimeout(20)
    received = b""
    while not received.endswith(b"\r\n\r\n4"):
        data = connection.recv(65536)
        if not data:
            return False
        received += data
    return True


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n", HEAD + b"X: "])
@pytest.mark.usefixtures("short")
def test_a_head_that_does_not_come_ends_the_connection(sent: bytes) -> None:
    with service() as address, socket.create_connection(address) as slow:
        slow.sendall(sent)
        assert rest(slow) == b""


@pytest.mark.usefixtures("short")
def test_a_head_byte_by_byte_is_no_longer_waited_for() -> None:
    """Slow-loris: something always comes, and never the end; on a connection that has been answered, too."""
    with service() as address, socket.create_connection(address) as slow:
        slow.sendall(HEAD + b"\r\nabcd")
        assert answered(slow)
        sent = 0
        with contextlib.suppress(ConnectionError):
            for sent in range(1000):
                slow.sendall(b"GET / HTTP/1.1\r\n" if not sent else b"x: y\r\n")
                time.sleep(0.02)
        assert sent < 900
        assert httpx.get(url(address)).text == "0"


@pytest.mark.usefixtures("short")
def test_a_body_that_does_not_come_is_said_and_others_are_answered() -> None:
    with service() as address, socket.create_connection(address) as slow:
        slow.sendall(HEAD + b"\r\nab")
        assert httpx.post(url(address), content=b"whole").text == "5"
        told = rest(slow)
        assert told.startswith(b"HTTP/1.1 408 ") and b"slow_body" in told


@pytest.mark.usefixtures("short")
def test_who_reads_nothing_is_dropped() -> None:
    with service() as address, socket.create_connection(address) as deaf:
        deaf.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(2)
        assert len(rest(deaf)) < 50_000_000


def test_who_has_closed_half_or_is_gone_disturbs_nobody() -> None:
    with service() as address:
        with socket.create_connection(address) as half:
            half.sendall(HEAD + b"\r\nab")
            half.shutdown(socket.SHUT_WR)
            assert httpx.post(url(address), content=b"whole").text == "5"
        for _ in range(50):
            with socket.create_connection(address) as gone:
                gone.sendall(HEAD)
        assert httpx.get(url(address)).text == "0"


def test_idle_connections_make_room_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS", 5)
    with service() as address, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(address)) for _ in range(5)]
        time.sleep(0.2)
        for _ in range(3):
            assert httpx.get(url(address)).text == "0"
        assert rest(idle[0]) == b""
        idle[-1].sendall(HEAD + b"\r\nabcd")
        assert answered(idle[-1])


@pytest.mark.parametrize("length", [True, False])
def test_a_large_body_is_refused_with_and_without_its_length(length: bool) -> None:
    def pieces(size: int) -> Iterator[bytes]:
        yield from (b"x" for _ in range(size))

    with service() as address:
        for size in (LARGEST, LARGEST + 1):
            content = b"x" * size if length else pieces(size)
            response = httpx.post(url(address), content=content)
            if size == LARGEST:
                assert response.text == str(size)
            else:
                assert response.status_code == 413
                assert response.json()["error"]["code"] == "too_large"


@pytest.mark.parametrize("told", [b"-1", b"1e3", b"9" * 40, b"4, 5", "\u0664".encode()])
def test_lengths_that_are_none_are_refused(told: bytes) -> None:
    with service() as address, socket.create_connection(address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + told + b"\r\n\r\n")
        assert rest(client)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413")


def test_a_head_without_end_is_refused() -> None:
    with service() as address, socket.create_connection(address) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200_000)
        assert rest(client)[:12] in (b"HTTP/1.1 400", b"")
        assert httpx.get(url(address)).text == "0"


def test_bodies_that_are_held_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HELD_BYTES", 100)
    with service() as address, socket.create_connection(address) as slow:
        slow.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200\r\n\r\n" + b"x" * 99)
        time.sleep(0.2)
        refused = httpx.post(url(address), content=b"xx")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        slow.close()
        time.sleep(0.2)
        assert httpx.post(url(address), content=b"xx").text == "2"


def test_requests_beyond_the_rate_wait() -> None:
    with service(rate=3, key="k") as address:
        statuses = [
            httpx.get(url(address, "large")).status_code for _ in range(3)
        ]  # who guesses keys is counted
        refused = httpx.get(url(address, "large"), headers={"Authorization": "Bearer k"})
        assert statuses == [401] * 3
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert httpx.get(url(address, "health")).status_code == 200


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 100)), max_size=60), st.integers(1, 30))
def test_no_minute_has_more_than_twice_the_rate(asked: list[tuple[str, float]], rate: int) -> None:
    """A full bucket and what flows in meanwhile; who is told to wait and does so is served."""
    bucket, now = RateFilter(Starlette(), rate, openai_refusal), 0.0
    served: dict[str, list[float]] = {"a": [], "b": []}
    for address, pause in asked:
        now += pause
        wait = bucket.taken(address, now)
        if wait:
            now += wait + 1e-6
            assert bucket.taken(address, now) == 0
        served[address].append(now)
    for times in served.values():
        for time_ in times:
            assert sum(time_ <= other < time_ + 60 for other in times) <= 2 * rate


def test_addresses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ADDRESSES", 2)
    bucket = RateFilter(Starlette(), 1, openai_refusal)
    assert [bucket.taken(address, 0.0) for address in "abab"] == [0, 0, 60, 60]
    assert [bucket.taken(address, 0.0) for address in "cba"] == [0, 60, 0]
