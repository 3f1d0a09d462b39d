"""A retriever service and an engine that fail in every way that the field's do."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dgpo_core.agent.engine import Generation, Request
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError
from tests.dgpo_core.agent.scripted import ScriptedEngine
from tests.web import Handler, handled

PASSAGES = [Passage(str(i), "Ada", f"Ada was born in Paris in 181{i}.") for i in range(9)]
Fault = str  # a key of SERVICE_FAULTS or ENGINE_FAULTS


def _found(queries: int, passages: int) -> bytes:
    """What a retriever says that finds the same for every query."""
    result = [{"document": {"id": p.id, "contents": p.contents}, "score": 9.0} for p in PASSAGES[:passages]]
    return json.dumps({"result": [result] * queries}).encode()


# status, body of (queries, passages wanted), seconds until it is sent, bytes of it that are never sent
Answer = tuple[int, Callable[[int, int], bytes], float, int]
SERVICE_FAULTS: dict[Fault, Answer] = {
    "slow": (200, _found, 0.1, 0),
    "too many passages": (200, lambda queries, _: _found(queries, 9), 0, 0),
    "hanging": (200, _found, 1.0, 0),
    "500": (500, lambda *_: b"traceback", 0, 0),
    "503": (503, lambda *_: b"", 0, 0),
    "malformed": (200, lambda *args: _found(*args).replace(b"contents", b"content"), 0, 0),
    "no JSON": (200, lambda *_: b"<html>welcome</html>", 0, 0),
    "empty": (200, lambda *_: b"", 0, 0),
    "too few results": (200, lambda queries, passages: _found(queries - 1, passages), 0, 0),
    "too many results": (200, lambda queries, passages: _found(queries + 1, passages), 0, 0),
    "dying midway": (200, _found, 0, 40),
}
HARMLESS = ("slow", "too many passages")  # what they give counts


@contextmanager
def faulty_service(fault: Fault | None, requests: int | None = None) -> Iterator[str]:
    """The URL of a retriever whose first `requests` answers are faulty; None: all are."""
    served = 0

    class Retriever(Handler):
        def do_GET(self) -> None:
            self.answer(404, {})  # as Search-R1's server, which has no /health

        def do_POST(self) -> None:
            nonlocal served
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served += 1
            faulty = fault is not None and (requests is None or served <= requests)
            status, body, seconds, lost = SERVICE_FAULTS[fault or ""] if faulty else (200, _found, 0.0, 0)
            time.sleep(seconds)
            content = body(len(asked["queries"]), asked["topk"])
            length = {"Content-Length": str(len(content))}
            self.answer(status, length, content[: len(content) - lost])

    with handled(Retriever) as url:
        yield url


def _refuse(made: Generation) -> Generation:
    raise InfrastructureError("the engine refuses")


def _slow(made: Generation) -> Generation:
    time.sleep(0.05)
    return made


ENGINE_FAULTS: dict[Fault, Callable[[Generation], Generation]] = {
    "slow": _slow,
    "refusing": _refuse,
    "no log-probabilities": lambda made: replace(made, logprobs=[]),
    "too few log-probabilities": lambda made: replace(made, logprobs=made.logprobs[:-1]),
    "too many log-probabilities": lambda made: replace(made, logprobs=[*made.logprobs, -0.5]),
    "too many tokens": lambda made: replace(
        made, token_ids=made.token_ids * 200, logprobs=made.logprobs * 200
    ),
    "NaN": lambda made: replace(made, logprobs=[math.nan] * len(made.logprobs)),
}


class FaultyEngine(ScriptedEngine):
    """A scripted engine with a fault in the requests that `when` (of the seed and the turn) chooses."""

    def __init__(
        self,
        tokenizer: Any,
        script: Callable[[tuple[int, ...], int], str],
        fault: Fault,
        when: Callable[[tuple[int, ...], int], bool],
    ) -> None:
        super().__init__(tokenizer, script)
        self._fault, self._when = fault, when

    def answer(self, request: Request, stop: tuple[str, ...]) -> Generation:
        made = super().answer(request, stop)
        *seed, turn = request.seed
        return ENGINE_FAULTS[self._fault](made) if self._when(tuple(seed), turn) else made
