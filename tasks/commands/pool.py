"""`dgpo pool` and `dgpo sizes`: reports of seeds that ran on other machines or days."""

from pathlib import Path

from dgpo_core.reporting.reproduction.report import pool_seeds
from dgpo_core.reporting.reproduction.seeds import find_records
from dgpo_core.reporting.reproduction.sizes import write_sizes


def write(folder: Path, out: Path) -> None:
    """Report on every seed's record in `folder`. Raises UserError."""
    records = find_records(folder)
    scope = pool_seeds(records, out)
    for model, seeds in scope.left_out.items():
        print(f"left out: {model}, which seed {', '.join(map(str, seeds))} lacks")
    print(f"{scope.profile}: {len(records)} seeds; report: {out / 'index.html'}")


def compare_sizes(folder: Path, out: Path) -> None:
    """Compare the profiles of all seeds' records below `folder`. Raises UserError."""
    profiles = write_sizes(folder, out)
    print(f"{', '.join(profiles)}; report: {out / 'sizes.html'}")
