"""A server of this process that speaks OpenAI's protocol; what its "model" says is a test's function."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.web import Handler, handled

Body = dict[str, Any]
Say = Callable[[Body], "str | int"]  # a request's body -> the text, or the status of a failure


class Endpoint:
    """What the server was asked, and where it is."""

    def __init__(self, url: str, requests: list[Body], keys: list[str | None]) -> None:
        self.url, self.requests, self.keys = url, requests, keys

    @property
    def source(self) -> str:
        return f"openai:some/model@{self.url}/v1"


@contextmanager
def endpoint(say: Say, stops: bool = True) -> Iterator[Endpoint]:
    """Serve chat completions, completions and models until the end of the block.

    As usual servers, it cuts a text before the first stop string, unless it knows of none (`stops`).
    """
    requests: list[Body] = []
    keys: list[str | None] = []
    lock = threading.Lock()

    class Answer(Handler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "some/model"}]})

        def do_POST(self) -> None:
            body: Body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append(body)
                keys.append(self.headers.get("Authorization"))
            said = say(body)
            if isinstance(said, int):
                self._send(said, {"error": {"message": "as the test says"}})
                return
            ends = [said.index(end) for end in body.get("stop", []) if stops and end in said]
            text = said[: min(ends)] if ends else said
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            what = {"message": {"role": "assistant", "content": text}}
            if self.path == "/v1/completions":
                what = {"text": text}  # type: ignore[dict-item]
            self._send(200, {"choices": [{**what, "finish_reason": "stop"}], "usage": usage})

        def _send(self, status: int, content: Body) -> None:
            self.answer(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

    with handled(Answer) as url:
        yield Endpoint(url, requests, keys)
