"""The HTTP service: OpenAI's chat completions, health, and a page on which an episode unfolds."""

import base64
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.serving.events import Event, Finished, Record, Stopped
from dgpo_core.serving.openai_format import ChatRequest, Completion, error
from dgpo_core.serving.queue import Busy, Desk, NotReady

PAGE = Path(__file__).parent / "templates" / "ask.html"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
IGNORED = "X-Ignored-Parameters"  # header of an answer: what of the request it did not depend on
LONGEST_HEADER = 1000
log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Problem:
    """How an exception is told to a client."""

    status: HTTPStatus
    body: dict[str, Any]

    def response(self) -> JSONResponse:
        retry = {"Retry-After": "5"} if self.status in (429, 503) else None
        return JSONResponse(self.body, self.status, retry)


class KnownHosts:
    """Refuses requests that name another host than these.

    A web page elsewhere could otherwise reach a service of this machine by a name that resolves to it.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = Headers(scope=scope).get("host", "") if scope["type"] == "http" else None
        if named is None or _host(named) in self._hosts:
            await self._app(scope, receive, send)
            return
        message = (
            f"this service answers to {', '.join(sorted(self._hosts))}, not to {_host(named)!a:.80}; "
            "`dgpo serve --allow-host NAME` allows a name (--host 0.0.0.0 opens the port to every machine)"
        )
        refusal = JSONResponse(error(message, "invalid_request_error", "host_not_allowed"), 400)
        await refusal(scope, receive, send)


def _host(header: str) -> str | None:
    """Return the name in a header `Host`, without its port."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return header


def make_app(desk: Desk, host: str, hosts: Collection[str] = (), origins: Collection[str] = ()) -> FastAPI:
    """Return the service of `desk`'s agent.

    On a loopback `host`, or with `hosts`, requests must name this machine or one of `hosts`. `origins` are
    those of web pages (scheme://host:port) whose scripts may ask.
    """
    app = FastAPI(title="DGPO search agent", docs_url=None, redoc_url=None)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[IGNORED],
            allow_private_network=True,
        )
    if host in LOOPBACK or hosts:
        app.add_middleware(KnownHosts, hosts=(*LOOPBACK, *hosts))
    page = PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _policy(page), "X-Content-Type-Options": "nosniff"}

    @app.get("/", response_class=HTMLResponse)
    async def ask_page() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/health")
    async def health() -> Response:
        """200 when questions are answered, 503 while model and index are loaded."""
        if desk.agent is None:
            return JSONResponse({"status": "loading"}, HTTPStatus.SERVICE_UNAVAILABLE)
        known = {"model": desk.agent.name, "index": desk.agent.index, "waiting": desk.waiting}
        return JSONResponse({"status": "ready", **known})

    @app.get("/v1/models")
    async def models() -> Response:
        data = [_model(desk.agent.name)] if desk.agent else []
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if desk.agent is None:
            return problem(NotReady()).response()
        return JSONResponse(_model(name)) if name == desk.agent.name else _no_model(name, desk.agent.name)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """One episode for one question; see the module wire for what a request may hold."""
        if desk.agent is not None and body.model != desk.agent.name:
            return _no_model(body.model, desk.agent.name)
        headers = _ignored(body.ignored)
        try:
            events = desk.admit(body.ask()).events(request.is_disconnected)
            first = await anext(events)  # until here an error has a status of its own
            if body.stream:
                wants_usage = bool(body.stream_options and body.stream_options.include_usage)
                stream = _stream(body.model, first, events, wants_usage)
                headers |= _UNBUFFERED
                return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
            return JSONResponse(Completion(body.model).whole(await _last(first, events)), headers=headers)
        except Exception as caught:
            return problem(caught).response()

    _tell_errors_as_openai_does(app)
    return app


_UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "dgpo"}


def _no_model(name: str, known: str) -> JSONResponse:
    message = f"there is no model {name!a:.80}; this service has {known!r}"
    return JSONResponse(error(message, "invalid_request_error", "model_not_found", "model"), 404)


def _ignored(names: list[str]) -> dict[str, str]:
    """Return the header that names them, in ASCII whatever a client calls its parameters."""
    return {IGNORED: ", ".join(ascii(name)[1:-1] for name in names)[:LONGEST_HEADER]} if names else {}


async def _last(first: Event, events: AsyncIterator[Event]) -> Record:
    """Raises InfrastructureError for an episode that failed: there is no answer, not even none."""
    event = first
    while not isinstance(event, Finished):
        event = await anext(events)
    if event.episode.failure is not None:
        raise InfrastructureError(event.episode.failure)
    return event.episode


async def _stream(
    model: str, first: Event, events: AsyncIterator[Event], wants_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events; what goes wrong now can only be told in one of them."""
    completion = Completion(model)
    yield _sse(completion.opening())
    event = first
    try:
        while not isinstance(event, Finished):
            for chunk in completion.chunks(event):
                yield _sse(chunk)
            event = await anext(events)
        if event.episode.failure is not None:
            raise InfrastructureError(event.episode.failure)
        for chunk in completion.chunks(event):
            yield _sse(chunk)
        if wants_usage:
            yield _sse(completion.usage(event.episode))
    except Exception as caught:
        yield _sse(problem(caught).body)
    yield "data: [DONE]\n\n"


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def problem(caught: Exception) -> Problem:
    """Users' faults and failures in their own words; of a bug, nothing leaves the process but its log."""
    match caught:
        case UserError():
            return Problem(HTTPStatus.BAD_REQUEST, error(str(caught), "invalid_request_error"))
        case InfrastructureError():
            message = f"no answer, because a part of the service failed: {caught}"
            return Problem(
                HTTPStatus.SERVICE_UNAVAILABLE, error(message, "server_error", "infrastructure_failure")
            )
        case NotReady():
            message = "model and index are not loaded (see /health); try again soon"
            return Problem(HTTPStatus.SERVICE_UNAVAILABLE, error(message, "server_error", "not_ready"))
        case Busy():
            message = "too many questions are waiting; try again soon"
            return Problem(HTTPStatus.TOO_MANY_REQUESTS, error(message, "rate_limit_error", "queue_full"))
        case Stopped():
            message = "the episode was stopped"
            return Problem(HTTPStatus.SERVICE_UNAVAILABLE, error(message, "server_error", "stopped"))
    log.error("an episode ended with a bug", exc_info=caught)
    message = "an error in the service; its log says more"
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, error(message, "server_error", "bug"))


def _tell_errors_as_openai_does(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, caught: RequestValidationError) -> Response:
        first = caught.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        message = first["msg"].removeprefix("Value error, ")
        told = f"{'.'.join(place) or 'body'}: {message}"
        return JSONResponse(error(told, "invalid_request_error", param=place[0] if place else None), 400)

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, caught: HTTPException) -> Response:
        body = error(str(caught.detail), "invalid_request_error")
        return JSONResponse(body, caught.status_code, caught.headers)


def _policy(page: str) -> str:
    """Only the page's own script runs, and it talks to this service alone."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
