"""`dgpo mcp`: the agent's tools for programs that speak the Model Context Protocol, over stdio or HTTP."""

import asyncio
import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from dgpo_core.config.params import load_params
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.serving.access import openai_refusal, restrict
from dgpo_core.serving.app import MAX_BODY
from dgpo_core.serving.limits import BodyFilter, server_config
from dgpo_core.serving.queue import RequestQueue
from tasks.commands.agent import open_agent, require_index, resolve_model
from tasks.commands.serve import GRACE, Server, api_key, require_hosts
from tasks.project.process import one_line
from tasks.project.servers import listen, run

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

    from dgpo_core.serving.agent import Agent

WAITING = 64  # calls that may wait; programs that call tools do not try again


def mcp(
    model: str | None, host: str, port: int | None, hosts: Sequence[str] = (), rate: int | None = None
) -> None:
    """Serve over HTTP on `port`, or else over this process's input and output, which end it.

    It answers at once; calls wait for the model. Raises UserError for what keeps it from starting.
    """
    require_hosts(hosts)
    key = api_key(host)
    params = load_params()
    require_index()
    try:
        from dgpo_core.serving.mcp_server import make_server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("mcp", "mcp_types"):
            raise
        install = "pip install -c constraints/main.txt -e '.[mcp]'"
        raise UserError(f"`dgpo mcp` needs the package mcp, which is not installed; {install}") from None
    source = resolve_model(params, model)
    queue = RequestQueue(WAITING, params.rollout.slots)
    server = make_server(queue)
    try:
        if port is None:
            _on_standard_input(server, queue, lambda: open_agent(params, source, model))
            return
        listening = listen(host, port)
        app = server.streamable_http_app(host="0.0.0.0")  # `restrict` looks at hosts
        app.add_middleware(BodyFilter, largest=MAX_BODY, refusal=openai_refusal)
        restrict(app, host, hosts, key=key, rate=rate)
        config = server_config(app, GRACE, "on")
        print(f"loading {source} and the index", flush=True)
        loading = queue.open(lambda: open_agent(params, source, model))
        run(Server(config, queue), listening, loading, f"{source} answers at {{url}}/mcp (Ctrl-C ends it)")
    finally:
        queue.shutdown()


def _on_standard_input(server: "MCPServer", queue: RequestQueue, load: Callable[[], "Agent"]) -> None:
    """Serve until the input ends, in a thread: a signal ends the process although the input is being read."""
    done: Future[None] = Future()

    def body() -> None:
        try:
            asyncio.run(_serve(server, queue, load))
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    try:
        done.result()
    except (KeyboardInterrupt, SystemExit) as ended:
        # Python would wait for ever at its end: that thread holds the lock of the input
        queue.shutdown()
        atexit._run_exitfuncs()
        os._exit(int(ended.code or 0) if isinstance(ended, SystemExit) else 128 + signal.SIGINT)


async def _serve(server: "MCPServer", queue: RequestQueue, load: Callable[[], "Agent"]) -> None:
    """Serve until the input ends. What goes wrong with loading is said there, and by every call."""
    loading = asyncio.create_task(queue.open(load))
    loading.add_done_callback(_say)
    await server.run_stdio_async()


def _say(loading: "asyncio.Task[None]") -> None:
    if not loading.cancelled() and (error := loading.exception()) is not None:
        kind = "the retriever is not there: " if isinstance(error, InfrastructureError) else ""
        print(f"error: {kind}{one_line(error)}", file=sys.stderr, flush=True)
