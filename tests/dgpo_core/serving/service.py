"""The service on a port of this machine, in a thread, as the tests' clients need it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from dgpo_core.serving.access import restrict
from dgpo_core.serving.agent import Agent
from dgpo_core.serving.app import make_app
from dgpo_core.serving.limits import server_config
from dgpo_core.serving.queue import RequestQueue
from dgpo_core.serving.recording import Recorder


@contextmanager
def serving(
    agent: Agent | None,
    waiting: int = 2,
    hosts: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    together: int = 1,
    key: str | None = None,
    examples: tuple[str, ...] = (),
    history: bool = False,
    recorder: Recorder | None = None,
    rate: int | None = None,
) -> Iterator[httpx.Client]:
    """A client of a running service; None: one that is loading for ever."""
    queue = RequestQueue(waiting, together)
    queue.agent = agent
    app = make_app(queue, examples, history, recorder)
    restrict(app, "127.0.0.1", hosts, origins, key, rate)
    config = server_config(app, 5)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            with httpx.Client(base_url=url, timeout=30) as client:
                while not server.started:
                    time.sleep(0.01)
                yield client
        finally:
            queue.close()
            server.should_exit = True
            thread.join(30)
            queue.shutdown()
