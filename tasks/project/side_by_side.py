"""Stages side by side: each by a `dvc repro` of its own, as soon as those that it needs are done.

Whatever one stage leaves of the cores, another takes: while it imports, reads, writes, or waits for its
slowest thread. The stage that most others wait for goes first, and those beside it get only what it leaves.
"""

import os
import resource
import sys
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from tasks.project.graph import Stage, is_stale, urgency
from tasks.project.groups import end_all, run_group
from tasks.project.progress import duration

COMMAND = (sys.executable, "-m", "tasks.commands.pipeline", "--single-item")
BEHIND = ("nice", "-n", "10")
UNCHANGED = "didn't change, skipping"
# what DVC says after each stage, for people who have run one
HINTS = (
    "Updating lock file",
    "To track the changes with git",
    "\tgit add",
    "To enable auto staging",
    "\tdvc config core.autostage",
    "Use `dvc push`",
)


@dataclass(frozen=True)
class Result:
    """How a stage ended: DVC's exit code; whether it was executed, or its outputs fetched."""

    stage: str
    code: int
    changed: bool


class Order:
    """Which stage is next, what runs, and what has been executed."""

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self._stages = stages
        self._urgency = urgency(stages)
        self._order = TopologicalSorter(
            {stage.name: set(stage.upstream) & set(stages) for stage in stages.values()}
        )
        self._order.prepare()
        self._ready: list[str] = []
        self.touched: set[str] = set()
        self.running: dict[Future[Result], str] = {}

    def next(self) -> str | None:
        """Take the most urgent of the ready stages; those with nothing to do are passed over."""
        while True:
            self._ready += self._order.get_ready()
            if not self._ready:
                return None
            self._ready.sort(key=self._urgency.__getitem__, reverse=True)
            name = self._ready.pop(0)
            if is_stale(self._stages[name], self.touched):
                return name
            _say(f"Stage '{name}' {UNCHANGED}")
            self._order.done(name)

    def is_behind(self, name: str) -> bool:
        """Tell whether more stages wait for one that runs than for this one."""
        return any(self._urgency[other][0] > self._urgency[name][0] for other in self.running.values())

    def end(self, future: Future[Result]) -> Result:
        """Take note of how a stage has ended."""
        del self.running[future]
        result = future.result()
        if result.code == 0:
            self._order.done(result.stage)
        if result.changed:
            self.touched.add(result.stage)
        return result


def run_stages(stages: Mapping[str, Stage], most: int) -> int:
    """Bring stages up to date, at most `most` at a time, and say how busy the cores were; return the code.

    After a failure nothing is started, and what runs goes on to its end.
    """
    order, code = Order(stages), 0
    started, before = time.monotonic(), _seconds_of_children()
    with ThreadPoolExecutor(most) as pool:
        try:
            while True:
                while not code and len(order.running) < most and (name := order.next()):
                    order.running[pool.submit(_execute, name, order.is_behind(name))] = name
                if not order.running:
                    break
                for future in wait(order.running, return_when=FIRST_COMPLETED).done:
                    result = order.end(future)
                    code = code or result.code
                    if result.code:
                        _say(f"error: {result.stage} failed; no other stage is started")
        finally:
            end_all()  # nothing is left, unless we are being ended
    if order.touched:
        wall, cores = time.monotonic() - started, os.cpu_count() or 1
        busy = (_seconds_of_children() - before) / wall / cores
        _say(f"{len(order.touched)} stages in {duration(wall)}; {cores} cores, {busy:.0%} busy")
    elif not code:
        _say("Data and pipelines are up to date.")
    return code


def _seconds_of_children() -> float:
    """Return the processor seconds of all that we have started and that has ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _execute(name: str, behind: bool) -> Result:
    """Run `dvc repro` for one stage."""
    started, prefix = time.monotonic(), f"[{name}] "

    def show(line: str) -> None:
        if not line.startswith(HINTS):
            _say(line if line.startswith(prefix) else prefix + line)

    command = [*(BEHIND if behind else ()), *COMMAND, name]
    code, tail = run_group(command, Path(), {**os.environ, "PYTHONUNBUFFERED": "1"}, show)
    changed = code == 0 and UNCHANGED not in tail
    if changed:
        _say(f"{prefix}done in {duration(time.monotonic() - started)}")
    return Result(name, code, changed)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # at once: several threads speak
    sys.stdout.flush()
