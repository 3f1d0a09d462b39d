"""Many clients at once for some minutes: `python -m benchmarks.load --minutes 10` (after `make demo`).

`dgpo serve` and `dgpo retriever` run in processes of their own, one after the other. Each client asks, waits
for the answer and asks again, after a pause where there was none (429). Counted are answers by status, their
times, and the service's memory when all are connected, at its most, and at the end.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import httpx
import psutil

from benchmarks.serving import running
from dgpo_core.config.params import load_params
from dgpo_core.datasets.records import read_questions
from tasks.project.paths import questions_file

WARM = 20.0  # seconds after which memory is looked at first: every client has asked by then
PAUSE = 1.0  # seconds that a client waits after a 429, whatever it is told
MIB = 2**20
ASK, SEARCH = "/v1/chat/completions", "/retrieve"


@dataclass
class Load:
    """What clients got: answers by status (or error), the seconds of those with 200; the service's MiB."""

    minutes: float
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def row(self, name: str, clients: int) -> str:
        """Return the load as a row of a table."""
        times = sorted(self.seconds)
        p50, p99 = (times[int(share * len(times))] for share in (0.5, 0.99)) if times else (0.0, 0.0)
        refused = self.statuses["429"]
        other = sum(self.statuses.values()) - self.statuses["200"] - refused
        rate = self.statuses["200"] / self.minutes / 60
        return (
            f"| {name} | {clients} | {self.minutes:g} | {self.statuses['200']} ({rate:.1f}/s) | {refused} "
            f"| {other} | {p50:.2f} | {p99:.2f} "
            f"| {self.memory[0]:.0f}, {max(self.memory):.0f}, {self.memory[-1]:.0f} |"
        )


async def load(
    url: str, path: str, body: Callable[[int], Any], clients: int, minutes: float, pid: int
) -> Load:
    """Let `clients` ask for some minutes; `body` is the request of a number."""
    found, process = Load(minutes), psutil.Process(pid)
    end = time.monotonic() + 60 * minutes
    numbers = iter(range(10**9))

    async def client() -> None:
        while time.monotonic() < end:
            started = time.perf_counter()
            try:
                status = str((await http.post(path, json=body(next(numbers)))).status_code)
            except httpx.HTTPError as error:
                status = type(error).__name__
            found.statuses[status] += 1
            if status == "200":
                found.seconds.append(time.perf_counter() - started)
            else:
                await asyncio.sleep(PAUSE)

    async def watch() -> None:
        await asyncio.sleep(min(WARM, 30 * minutes))
        while time.monotonic() < end:
            found.memory.append(process.memory_info().rss / MIB)
            await asyncio.sleep(5)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        await asyncio.gather(watch(), *(client() for _ in range(clients)))
    found.memory.append(process.memory_info().rss / MIB)
    return found


def measure(service: str, clients: int, minutes: float, model: str, waiting: int) -> str:
    """Put one service under load, and return its row."""
    names = load_params().questions.test
    sets = [read_questions(questions_file(name, "test")) for name in names]
    asked = [question.question for question in chain(*zip(*sets, strict=False))]

    def question(number: int) -> dict[str, Any]:
        message = {"role": "user", "content": asked[number % len(asked)]}
        return {"model": model, "messages": [message], "temperature": 0}

    def queries(number: int) -> dict[str, Any]:
        return {"queries": [asked[number % len(asked)]], "topk": 3, "return_scores": True}

    serving = service == "serve"
    words = ["serve", "--model", model, "--waiting", str(waiting)] if serving else ["retriever"]
    path, body = (ASK, question) if serving else (SEARCH, queries)
    with running(words) as (client, process):
        found = asyncio.run(load(str(client.base_url), path, body, clients, minutes, process.pid))
        assert client.get("/health").status_code == httpx.codes.OK
    print(json.dumps(found.statuses), flush=True)
    return found.row(f"`dgpo {' '.join(words)}`", clients)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", default="kd")
    parser.add_argument("--waiting", type=int, default=8)
    parser.add_argument(
        "--service", choices=["serve", "retriever"], nargs="+", default=["serve", "retriever"]
    )
    given = parser.parse_args()
    print("| service | clients | minutes | answers | 429 | others | p50 s | p99 s | MiB first, most, last |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for service in given.service:
        print(measure(service, given.clients, given.minutes, given.model, given.waiting), flush=True)


if __name__ == "__main__":
    main()
