"""Contenders timed in turns: what one run can say about which is faster, and by how much.

One after the other in rounds, so that whatever else the machine does falls on all of them alike; the order
is turned by one each round. What counts is the ratio within a round; its median is reported with the least
and the greatest. Times are kept as pyperf's suites (`python -m pyperf stats FILE`, `compare_to`, `hist`).
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyperf

PAGE = Path("docs/benchmarks.md")


@dataclass(frozen=True)
class Rounds:
    """Seconds of each contender, round by round. `ours` is the one that all others are compared with."""

    name: str
    seconds: dict[str, list[float]]
    work: float = 1.0  # units of work in one round: episodes, tokens, queries
    unit: str = "run"

    @property
    def ours(self) -> str:
        return next(iter(self.seconds))

    def rate(self, contender: str) -> float:
        """Return the units of work a second, by the median round."""
        return self.work / statistics.median(self.seconds[contender])

    def ratios(self, contender: str) -> list[float]:
        """Return how many times as long as ours the contender took, round by round, sorted."""
        pairs = zip(self.seconds[contender], self.seconds[self.ours], strict=True)
        return sorted(theirs / ours for theirs, ours in pairs)

    def ratio(self, contender: str) -> float:
        """Return the median of the ratios: above 1 where ours is faster."""
        return statistics.median(self.ratios(contender))

    def suite(self) -> pyperf.BenchmarkSuite:
        """Return the times as pyperf keeps them."""
        benchmarks = []
        for contender, seconds in self.seconds.items():
            runs = [pyperf.Run([value], metadata={"name": f"{self.name}: {contender}"}) for value in seconds]
            benchmarks.append(pyperf.Benchmark(runs))
        return pyperf.BenchmarkSuite(benchmarks)


def alternate(
    name: str,
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    work: float = 1.0,
    unit: str = "run",
) -> Rounds:
    """Run every contender once to warm up, then once a round. The first one is ours."""
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    names = list(contenders)
    for number in range(rounds):
        turn = number % len(names)
        for contender in names[turn:] + names[:turn]:
            started = time.perf_counter()
            contenders[contender]()
            seconds[contender].append(time.perf_counter() - started)
        print(f"{name}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return Rounds(name, seconds, work, unit)


def table(results: list[Rounds]) -> str:
    """Return a Markdown table of what was measured."""
    lines = [
        "| measured | contender | a second | times ours: median (least to greatest) |",
        "|---|---|---|---|",
    ]
    for rounds in results:
        for contender in rounds.seconds:
            ratios = rounds.ratios(contender)
            compared = (
                "1"
                if contender == rounds.ours
                else (f"**{rounds.ratio(contender):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            )
            rate = f"{rounds.rate(contender):.3g} {rounds.unit}s"
            lines.append(f"| {rounds.name} | {contender} | {rate} | {compared} |")
    return "\n".join(lines)


def fill(name: str, text: str, page: Path = PAGE) -> None:
    """Write a part of the page: between its lines `<!-- name -->` and `<!-- end name -->`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    content = page.read_text(encoding="utf-8")
    before, rest = content.split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def save(results: list[Rounds], path: Path) -> None:
    """Write all times to one of pyperf's JSON files."""
    benchmarks = [benchmark for rounds in results for benchmark in rounds.suite()]
    pyperf.BenchmarkSuite(benchmarks).dump(str(path), replace=True)
