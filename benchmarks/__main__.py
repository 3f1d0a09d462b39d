"""What is compared with others, in one run: `make bench` (after `make demo`, whose models and index it uses).

Writes all times to `runs/benchmarks.json` (pyperf's format), the table into docs/benchmarks.md, and the
ratios to `benchmarks/ratios.json`. With `--guard` nothing is written: it exits with 1 when a ratio is more
than 20 % below the one that is checked in.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import peer_rollouts, peer_updates
from benchmarks.alternation import Rounds, alternate, fill, save, table
from flows.server import API_URL, local_server

MODEL = Path("models/kd")
TIMES = Path("runs/benchmarks.json")
RATIOS = Path(__file__).parent / "ratios.json"
ALLOWED_DROP = 0.2
COMMANDS = {
    "`dgpo --help`": ["tasks.commands.cli", "--help"],
    "`dvc repro`, nothing to do": ["dvc", "repro", "-q"],
    "a stage that computes nothing (`filter`)": ["tasks.stages.filter"],
    "`dgpo run`, nothing to do, with a Prefect server": ["tasks.commands.cli", "run"],
}
PREFECT_PORT = 4289  # of the server that runs meanwhile


def commands(rounds: int) -> list[Rounds]:
    """Time whole commands, each alone: there is nobody to compare them with. They may keep bytecode."""
    found = []
    with local_server(PREFECT_PORT) as url:
        environment = {**os.environ, API_URL: url}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for name, arguments in COMMANDS.items():
            command = [sys.executable, "-m", *arguments]
            run = partial(subprocess.run, command, env=environment, check=True, capture_output=True)
            found.append(alternate(name, {"ours": run}, rounds))
    return found


def report(results: list[Rounds], alone: list[Rounds], checks: list[str], memory: str) -> str:
    """Return the page's part that this run fills."""
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    lines = [f"{machine}, {versions}.", "", table(results), "", *(f"- {check}" for check in checks), ""]
    lines += [memory, ""]
    lines += ["| command | seconds: median (least to greatest) |", "|---|---|"]
    for one in alone:
        seconds = sorted(one.seconds["ours"])
        lines.append(f"| {one.name} | {1 / one.rate('ours'):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f}) |")
    return "\n".join(lines)


def ratios_of(results: list[Rounds]) -> dict[str, float]:
    return {
        f"{one.name}: {peer}": round(one.ratio(peer), 3)
        for one in results
        for peer in one.seconds
        if peer != one.ours
    }


def dropped(now: dict[str, float], before: dict[str, float]) -> list[str]:
    """Return a line for each ratio that has dropped by more than is allowed, or is gone."""
    lines = []
    for name, ratio in before.items():
        if now.get(name, 0.0) < (1 - ALLOWED_DROP) * ratio:
            lines.append(f"{name}: {now.get(name, 0.0):.2f}, was {ratio:.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--guard", action="store_true", help="compare with the ratios that are checked in")
    given = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit(f"error: {MODEL} is missing: run `make demo` first")
    rolled, same = peer_rollouts.compare(str(MODEL), 128, given.rounds)
    updates = peer_updates.compare(given.rounds, memory=not given.guard)
    results = [rolled, *(update.rounds for update in updates)]
    if given.guard:
        worse = dropped(ratios_of(results), json.loads(RATIOS.read_text(encoding="utf-8")))
        print(table(results), *worse, sep="\n")
        raise SystemExit(1 if worse else 0)
    checks = [
        f"greedy episodes that are Search-R1's loop's to the letter: {same:.1%}",
        *(
            f"{one.rounds.name}: TRL {one.trl}, gradients that differ by {one.difference:.0e} of their norm"
            for one in updates
        ),
    ]
    alone = commands(given.rounds)
    save(results + alone, TIMES)
    RATIOS.write_text(json.dumps(ratios_of(results), indent=2) + "\n", encoding="utf-8")
    written = report(results, alone, checks, peer_updates.memory_table(updates))
    fill("measured", written)
    print(written)


if __name__ == "__main__":
    main()
