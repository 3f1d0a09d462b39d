"""Answers a second at several numbers of clients: `python -m benchmarks.serving` (after `make demo`).

`dgpo serve` runs in a process of its own. Each number of clients asks the same test questions, greedily, each
client one at a time. The answers must be those that one client gets.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import httpx

from benchmarks.alternation import fill
from dgpo_core.config.params import load_params
from dgpo_core.datasets.records import read_questions
from tasks.project.paths import questions_file

CLIENTS = (1, 4, 16, 64)
READY = 120.0  # seconds in which the service must be ready


class Load(NamedTuple):
    """What a number of clients got: answers, seconds of each, tokens written, and seconds of all."""

    answers: list[str]
    latencies: list[float]
    tokens: int
    seconds: float


@contextmanager
def running(words: list[str]) -> Iterator[tuple[httpx.Client, "subprocess.Popen[str]"]]:
    """Yield a client of a service of ours, when it is ready, and its process; end it afterwards."""
    command = [sys.executable, "-m", "tasks.commands.cli", *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = next(filter(None, (re.search(r"http://\S+", line) for line in process.stdout)))[0]
            with httpx.Client(
                base_url=address, timeout=600, limits=httpx.Limits(max_connections=64)
            ) as client:
                deadline = time.monotonic() + READY
                while client.get("/health").status_code != httpx.codes.OK:
                    if time.monotonic() > deadline:
                        raise SystemExit("error: the service does not become ready")
                    time.sleep(0.2)
                yield client, process
        finally:
            process.terminate()


def ask(client: httpx.Client, model: str, question: str) -> tuple[str, float, int]:
    """Return an answer, the seconds that it took, and the tokens that were written for it."""
    started = time.perf_counter()
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    reply = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    seconds = time.perf_counter() - started
    return reply["choices"][0]["message"]["content"], seconds, reply["usage"]["completion_tokens"]


def load(client: httpx.Client, model: str, questions: list[str], clients: int) -> Load:
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        replies = list(threads.map(lambda question: ask(client, model, question), questions))
    answers, latencies, tokens = zip(*replies, strict=True)
    return Load(list(answers), list(latencies), sum(tokens), time.perf_counter() - started)


def compare(model: str, count: int, rounds: int) -> dict[int, list[Load]]:
    """Let each number of clients ask the same `count` test questions in each round."""
    names = load_params().questions.test
    sets = [read_questions(questions_file(name, "test")) for name in names]
    mixed = [question.question for question in chain(*zip(*sets, strict=False))][:count]
    found: dict[int, list[Load]] = {clients: [] for clients in CLIENTS}
    with running(["serve", "--model", model, "--waiting", "64"]) as (client, _):
        load(client, model, mixed[:8], 1)
        for number in range(rounds):
            for clients in CLIENTS[number % len(CLIENTS) :] + CLIENTS[: number % len(CLIENTS)]:
                found[clients].append(load(client, model, mixed, clients))
    return found


def report(found: dict[int, list[Load]]) -> str:
    """Return the page's part that this run fills."""
    lines = ["| clients | answers/s | tokens/s | times one client | p50 s | p99 s | same answers |"]
    lines += ["|---|---|---|---|---|---|---|"]
    alone = found[1]
    for clients, loads in found.items():
        ratios = [one.seconds / many.seconds for one, many in zip(alone, loads, strict=True)]
        times = sorted(chain(*(one.latencies for one in loads)))
        same = statistics.mean(
            a == b for one in loads for a, b in zip(one.answers, alone[0].answers, strict=True)
        )
        middle = sorted(loads, key=lambda one: one.seconds)[len(loads) // 2]
        rate, tokens = len(middle.answers) / middle.seconds, middle.tokens / middle.seconds
        p50, p99 = times[len(times) // 2], times[int(0.99 * len(times))]
        lines.append(
            f"| {clients} | {rate:.1f} | {tokens:.0f} | **{statistics.median(ratios):.2f}** | {p50:.2f} "
            f"| {p99:.2f} | {same:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="kd")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    text = report(compare(given.model, given.questions, given.rounds))
    fill("serving", text)
    print(text)


if __name__ == "__main__":
    main()
