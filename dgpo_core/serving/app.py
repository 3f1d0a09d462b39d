"""The HTTP service: OpenAI's chat completions, health, and a page on which an episode unfolds."""

import base64
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.serving.access import IGNORED, openai_refusal
from dgpo_core.serving.events import EpisodeCancelled, EpisodeEnd, Event
from dgpo_core.serving.limits import BodyFilter
from dgpo_core.serving.metrics import Metrics
from dgpo_core.serving.openai_format import ChatRequest, Completion, error
from dgpo_core.serving.queue import NotReady, QueueFull, RequestQueue
from dgpo_core.serving.recording import Rating, Recorder, recorded

PAGE = Path(__file__).parent / "templates" / "ask.html"
LONGEST_HEADER = 1000
MAX_BODY = 2**20  # bytes of a request: a conversation, of which the model reads the end
RETRY = {"Retry-After": "5"}
log = logging.getLogger("uvicorn.error")


def make_app(
    queue: RequestQueue,
    examples: Sequence[str] = (),
    history: bool = False,
    recorder: Recorder | None = None,
) -> FastAPI:
    """Return the service of the agent behind `queue`; access.py restricts who may ask.

    `examples` are questions that the page proposes. With `history` a question comes with the conversation
    before it. A `recorder` gets the answers, and what people think of them.
    """
    app = FastAPI(title="DGPO search agent", docs_url=None, redoc_url=None)
    metrics = Metrics(queue)
    page = PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _content_security_policy(page), "X-Content-Type-Options": "nosniff"}

    @app.get("/", response_class=HTMLResponse)
    async def ask_page() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/health")
    async def health() -> Response:
        """Return 200 when questions are answered, 503 while model and index are loaded."""
        if queue.agent is None:
            return JSONResponse({"status": "loading"}, HTTPStatus.SERVICE_UNAVAILABLE, RETRY)
        known = {"model": queue.agent.name, "index": queue.agent.index, "waiting": queue.waiting}
        kept = {} if recorder is None else {"recorded": True}
        return JSONResponse({"status": "ready", **known, **kept})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/examples")
    async def proposed() -> list[str]:
        return list(examples)

    _add_completions(app, queue, metrics, history, recorder)
    if recorder is not None:
        _add_feedback(app, recorder)
    _add_error_handlers(app)
    app.add_middleware(BodyFilter, largest=MAX_BODY, refusal=openai_refusal)
    return app


def _add_completions(
    app: FastAPI, queue: RequestQueue, metrics: Metrics, history: bool, recorder: Recorder | None
) -> None:
    """Add OpenAI's endpoints: the one model, and its chat completions."""

    @app.get("/v1/models")
    async def models() -> Response:
        data = [_model(queue.agent.name)] if queue.agent else []
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if queue.agent is None:
            return error_response(NotReady())
        return JSONResponse(_model(name)) if name == queue.agent.name else _no_model(name, queue.agent.name)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Run one episode for one question; `openai_format` says what a request may hold."""
        if queue.agent is not None and body.model != queue.agent.name:
            return _no_model(body.model, queue.agent.name)
        headers = _ignored(body.ignored(history))
        try:
            asked = queue.submit(body.agent_request(history))
            completion = Completion(body.model)
            events = metrics.observe(asked.events(request.is_disconnected))
            if recorder is not None:
                events = recorded(events, completion.id, recorder)
            event = await anext(events)  # until here an error has a status of its own
            if body.stream:
                wants_usage = bool(body.stream_options and body.stream_options.include_usage)
                stream = _stream(completion, event, events, wants_usage)
                headers |= _UNBUFFERED
                return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
            while not isinstance(event, EpisodeEnd):
                completion.reason(event)
                event = await anext(events)
            return JSONResponse(completion.whole(event.episode), headers=headers)
        except Exception as caught:
            return error_response(caught)


def _add_feedback(app: FastAPI, recorder: Recorder) -> None:
    @app.post("/v1/feedback")
    async def feedback(rating: Rating) -> Response:
        """Take a thumb for an answer, which is named by its response's id."""
        if recorder.rate(rating):
            return JSONResponse({"status": "kept"}, HTTPStatus.ACCEPTED)
        message = f"no answer of this service has the id {rating.id!a}"
        return JSONResponse(error(message, "invalid_request_error", "unknown_answer", "id"), 404)


_UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "dgpo"}


def _no_model(name: str, known: str) -> JSONResponse:
    message = f"there is no model {name!a:.80}; this service has {known!r}"
    return JSONResponse(error(message, "invalid_request_error", "model_not_found", "model"), 404)


def _ignored(names: list[str]) -> dict[str, str]:
    """Return the header that names them, in ASCII and without spaces around, whatever a client calls them."""
    named = ", ".join(ascii(name)[1:-1] for name in names)[:LONGEST_HEADER].strip()
    return {IGNORED: named} if names else {}


async def _stream(
    completion: Completion, first: Event, events: AsyncIterator[Event], wants_usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events; what goes wrong now can only be said in one of them."""
    yield _sse(completion.opening())
    event: Event | None = first
    try:
        while event is not None:
            for chunk in completion.chunks(event):
                yield _sse(chunk)
            if isinstance(event, EpisodeEnd) and wants_usage:
                yield _sse(completion.usage(event.episode))
            event = await anext(events, None)
    except Exception as caught:
        yield _sse(error_reply(caught)[1])
    yield "data: [DONE]\n\n"


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def error_response(caught: Exception) -> JSONResponse:
    """Return the response to an exception; where another try may help, it says when."""
    status, body = error_reply(caught)
    return JSONResponse(body, status, RETRY if status in (429, 503) else None)


def error_reply(caught: Exception) -> tuple[HTTPStatus, dict[str, Any]]:
    """Return status and body: faults and failures in their own words; of a bug, only the log says more."""
    down = HTTPStatus.SERVICE_UNAVAILABLE
    match caught:
        case UserError():
            return HTTPStatus.BAD_REQUEST, error(str(caught), "invalid_request_error")
        case InfrastructureError():
            message = f"no answer, because a part of the service failed: {caught}"
            return down, error(message, "server_error", "infrastructure_failure")
        case NotReady():
            message = "model and index are not loaded (see /health); try again soon"
            return down, error(message, "server_error", "not_ready")
        case QueueFull():
            message = "too many questions are waiting; try again soon"
            return HTTPStatus.TOO_MANY_REQUESTS, error(message, "rate_limit_error", "queue_full")
        case EpisodeCancelled():
            return down, error("the episode was stopped", "server_error", "stopped")
    log.error("an episode ended with a bug", exc_info=caught)
    message = "an error in the service; its log says more"
    return HTTPStatus.INTERNAL_SERVER_ERROR, error(message, "server_error", "bug")


def _add_error_handlers(app: FastAPI) -> None:
    """Make FastAPI's own errors look like OpenAI's."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, caught: RequestValidationError) -> Response:
        first = caught.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        message = first["msg"].removeprefix("Value error, ")
        text = f"{'.'.join(place) or 'body'}: {message}"
        return JSONResponse(error(text, "invalid_request_error", param=place[0] if place else None), 400)

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, caught: HTTPException) -> Response:
        body = error(str(caught.detail), "invalid_request_error")
        return JSONResponse(body, caught.status_code, caught.headers)


def _content_security_policy(page: str) -> str:
    """Return a policy by which only the page's own script runs, and talks to this service alone."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
