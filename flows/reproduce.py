"""The paper's comparison: every recipe, several seeds, and a report with a verdict on each of its claims.

    python -m flows.reproduce --seed 0 --seed 1 [--recipe dgpo ...] [--max-parallel 2]

Each seed runs in a git worktree of its own at the current commit (`.runs/<profile>-seed-<n>`, kept), with the
project's DVC cache: what no seed changes is made once, and a killed run continues where it was.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow
from prefect.artifacts import create_markdown_artifact

from dgpo_core.config.params import load_params, resolve_profile
from dgpo_core.reporting.reproduction.records import Record, keep, pool
from dgpo_core.reporting.reproduction.sizes import write_sizes
from flows.pipeline import PipelineFailed, stages
from flows.settings import PipelineSettings
from flows.workspace import enter_project, open_workspace
from flows.workspace import run as run_command
from tasks.stage import main as run_program
from tasks.use import profile_path

REPORT, SEEDS = Path("reproduction"), "seeds"


@flow(name="reproduce", persist_result=False)
def reproduce(
    profile: str = "tiny",
    recipes: list[str] | None = None,
    seeds: list[int] | None = None,
    max_parallel: int = 1,
) -> None:
    """Run the stages for every seed, then write the report of all of them.

    `recipes` are rows of the paper's table, or `["all"]` (the default). A seed that fails does not stop the
    others; the report is written when all have succeeded. Raises UserError and PipelineFailed.
    """
    root = enter_project()
    seeds = sorted(set(seeds or [0, 1, 2]))
    params = resolve_profile(profile_path(profile, root), recipes or ["all"])
    trees = {seed: _worktree(root, profile, params, seed) for seed in seeds}
    failures: list[str] = []
    for seed, tree in trees.items():
        try:
            stages(tree, PipelineSettings(max_parallel=max_parallel))
        except PipelineFailed as error:
            failures.append(f"seed {seed}: {error}")
    if failures:
        raise PipelineFailed("; ".join(failures))
    out = root / REPORT / profile
    pool([keep(tree, out / SEEDS, _record(tree)) for tree in trees.values()], out)
    write_sizes(root / REPORT)
    create_markdown_artifact((out / "results.md").read_text(encoding="utf-8"), key="reproduction")


def _record(tree: Path) -> Record:
    params = load_params(tree / "params.yaml")
    return Record(
        profile=params.profile,
        seed=params.seed,
        commit=run_command("git", "rev-parse", "HEAD", cwd=tree),
        models=params.compare,
        mirrors=dict(params.questions.test),
        pair=params.pair,
        first=dict(params.report.first),
    )


def _worktree(root: Path, profile: str, params: dict[str, Any], seed: int) -> Path:
    """A seed's worktree at the current commit, with what it has already made."""
    workspace = open_workspace(root, f"{profile}-seed-{seed}", keep_lock=True)
    comment = f"Written by `python -m flows.reproduce`: seed {seed}."
    workspace.write_params({**params, "seed": seed}, comment)
    return workspace.tree


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    profile: Annotated[str, typer.Option(help="a profile of profiles/")] = "tiny",
    recipe: Annotated[list[str] | None, typer.Option(help="row of the paper's table; repeatable")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="repeatable; 0, 1 and 2 unless given")] = None,
    max_parallel: Annotated[int, typer.Option(help="stages side by side")] = 1,
) -> None:
    """Reproduce the paper's comparison now."""
    # stages side by side would otherwise fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max_parallel)))
    try:
        reproduce(profile, recipe, seed, max_parallel)
    except PipelineFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"report: {REPORT / profile / 'index.html'}")


if __name__ == "__main__":
    run_program(app)
