"""Who may ask: requests that name this machine, come from a page that is allowed, and know the key."""

import secrets
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from dgpo_core.serving.limits import RateFilter, Refusal
from dgpo_core.serving.openai_format import error

LOOPBACK = ("127.0.0.1", "localhost", "::1")
IGNORED = "X-Ignored-Parameters"  # header of an answer: what of the request it did not depend on
OPEN = ("/", "/health", "/metrics")  # without the key: the page's frame, and what machines watch


def openai_refusal(message: str, code: str) -> dict[str, Any]:
    """Return a refusal in OpenAI's form of an error."""
    return error(message, "rate_limit_error" if code == "rate_limit" else "invalid_request_error", code)


def restrict(
    app: FastAPI | Starlette,
    host: str,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    key: str | None = None,
    rate: int | None = None,
    refusal: Refusal = openai_refusal,
) -> None:
    """Let `app`, which listens on `host`, answer only those who may ask.

    On a loopback `host`, or with `hosts`, requests must name this machine or one of `hosts`. `origins` are
    those of web pages (scheme://host:port) whose scripts may ask. `key` must be each request's bearer token.
    An address may send `rate` requests a minute, those of others' keys included.
    """
    if key is not None:
        app.add_middleware(KeyFilter, key=key, refusal=refusal)
    if rate is not None:
        app.add_middleware(RateFilter, rate=rate, refusal=refusal, exempt=OPEN)
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
        app.add_middleware(HostFilter, hosts=(*LOOPBACK, *hosts), refusal=refusal)


class HostFilter:
    """Refuses requests that name another host than these.

    A web page elsewhere could otherwise reach a service of this machine by a name that resolves to it.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], refusal: Refusal) -> None:
        self._app, self._hosts, self._refusal = app, {host.lower() for host in hosts}, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = Headers(scope=scope).get("host", "") if scope["type"] == "http" else None
        if named is None or _host(named) in self._hosts:
            await self._app(scope, receive, send)
            return
        message = (
            f"this service answers to {', '.join(sorted(self._hosts))}, not to {_host(named)!a:.80}; "
            "`--allow-host NAME` at its start allows a name (--host 0.0.0.0 opens the port to every machine)"
        )
        await JSONResponse(self._refusal(message, "host_not_allowed"), 400)(scope, receive, send)


def _host(header: str) -> str | None:
    """Return the name in a header `Host`, without its port."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return header


class KeyFilter:
    """Refuses requests without the key; OPEN is open to everyone."""

    def __init__(self, app: ASGIApp, key: str, refusal: Refusal) -> None:
        self._app, self._expected, self._refusal = app, f"Bearer {key}".encode(), refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(given, self._expected):
                message = "this service asks for its API key, as `Authorization: Bearer <key>`"
                body = self._refusal(message, "invalid_api_key")
                await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)
