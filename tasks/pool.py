"""`dgpo pool`: one report of seeds that ran on other machines or days."""

from pathlib import Path

from dgpo_core.reporting.reproduction.records import RECORD, pool


def write(folder: Path, out: Path) -> None:
    """Report on every seed's record in `folder`. Raises UserError."""
    records = sorted((path.parent for path in folder.glob(f"*/{RECORD}")), key=lambda path: path.name)
    pooled = pool(records, out)
    for model, seeds in pooled.left_out.items():
        print(f"left out: {model}, which seed {', '.join(map(str, seeds))} lacks")
    print(f"{pooled.profile}: {len(records)} seeds; report: {out / 'index.html'}")
