"""Change the objectives and the agent loop in one place at a time, and count what a test notices.

`python -m benchmarks.mutants [--share 0.2]` lets mutmut (`[tool.mutmut]` of pyproject.toml) make all changes,
or a share of each module's that a seed draws, and prints a table and the survivors. It exits with 1 when
fewer than 85 % are killed. `--resume` goes on where a run of the same code stopped (`mutants/`).
"""

import argparse
import math
import random
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from mutmut.configuration import config
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name

LEAST = 0.85  # killed, of those tried
KILLED = ("killed", "timeout")


def drawn(share: float) -> list[str]:
    """Return the names of a share of each module's mutants."""
    names = []
    for path in sorted(Path("dgpo_core").rglob("*.py")):
        if config().should_mutate(path):
            made = mutate_file_contents(str(path), path.read_text(encoding="utf-8")).mutant_names
            chosen = random.Random(str(path)).sample(made, math.ceil(share * len(made)))
            names += [get_mutant_name(path, name) for name in chosen]
    return names


def results() -> dict[str, str]:
    """Return what became of each mutant that was tried."""
    command = ["mutmut", "results", "--all", "true"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    found = dict(line.strip().split(": ") for line in told if line)
    return {name: status for name, status in found.items() if status != "not checked"}


def report(found: dict[str, str]) -> float:
    """Print the survivors and a table; return the share of the killed."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, status in found.items():
        counts[name.rpartition(".x")[0]][status] += 1
        if status not in KILLED:
            print(f"{status}: mutmut show {name}")
    print("\n| module | mutants | killed | share |\n|---|---|---|---|")
    share = 0.0
    for module, statuses in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        killed = sum(statuses[status] for status in KILLED)
        share = killed / max(statuses.total(), 1)
        print(f"| {module} | {statuses.total()} | {killed} | {share:.0%} |")
    return share


def main() -> int:
    """Try mutants, and report. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of each module's mutants")
    parser.add_argument("--processes", default="2")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    if not arguments.resume:
        shutil.rmtree("mutants", ignore_errors=True)  # mutmut does not renew every file of it
    names = drawn(arguments.share) if arguments.share < 1 else []
    subprocess.run(["mutmut", "run", "--max-children", arguments.processes, *names], check=True)
    return int(report(results()) < LEAST)


if __name__ == "__main__":
    sys.exit(main())
