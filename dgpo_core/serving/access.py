"""Who may ask: requests that name this machine, come from a page that is allowed, and know the key."""

import secrets
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from dgpo_core.serving.openai_format import error

LOOPBACK = ("127.0.0.1", "localhost", "::1")
IGNORED = "X-Ignored-Parameters"  # header of an answer: what of the request it did not depend on
OPEN = ("/", "/health", "/metrics")  # without the key: the page's frame, and what machines watch


def restrict(
    app: FastAPI | Starlette,
    host: str,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    key: str | None = None,
) -> None:
    """Let `app`, which listens on `host`, answer only those who may ask.

    On a loopback `host`, or with `hosts`, requests must name this machine or one of `hosts`. `origins` are
    those of web pages (scheme://host:port) whose scripts may ask. `key` must be each request's bearer token.
    """
    if key is not None:
        app.add_middleware(KeyFilter, key=key)
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
        app.add_middleware(HostFilter, hosts=(*LOOPBACK, *hosts))


class HostFilter:
    """Refuses requests that name another host than these, in OpenAI's form of an error.

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
            "`--allow-host NAME` at its start allows a name (--host 0.0.0.0 opens the port to every machine)"
        )
        refusal = JSONResponse(error(message, "invalid_request_error", "host_not_allowed"), 400)
        await refusal(scope, receive, send)


def _host(header: str) -> str | None:
    """Return the name in a header `Host`, without its port."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return header


class KeyFilter:
    """Refuses requests without the key, in OpenAI's form of an error; OPEN is open to everyone."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(given, self._expected):
                message = "this service asks for its API key, as `Authorization: Bearer <key>`"
                body = error(message, "invalid_request_error", "invalid_api_key")
                await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)
