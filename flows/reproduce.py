"""The paper's comparison: every recipe, several seeds, and a report with a verdict on each of its claims.

    python -m flows.reproduce --seed 0 --seed 1 [--recipe dgpo ...] [--max-parallel 2]

Each seed runs in a git worktree of its own at the current commit (`.runs/<profile>-seed-<n>`, kept), with the
project's DVC cache: what no seed changes is made once, and a killed run continues where it was.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml
from prefect import flow

from dgpo_core.config.params import load_params, resolve_profile
from dgpo_core.errors import UserError
from dgpo_core.reporting.reproduction.sizes import write_sizes
from dgpo_core.reporting.reproduction.write import write_reproduction
from flows.pipeline import PipelineFailed, pipeline
from tasks.stage import main as run_program
from tasks.use import profile_path

RUNS, REPORT = Path(".runs"), Path("reproduction")


@flow(name="reproduce", persist_result=False)
def reproduce(
    profile: str = "tiny",
    recipes: list[str] | None = None,
    seeds: list[int] | None = None,
    max_parallel: int = 1,
    root: Path = Path(),
) -> None:
    """Run the pipeline for every seed, then write the report of all of them.

    `recipes` are rows of the paper's table, or `["all"]` (the default). A seed that fails does not stop the
    others; the report is written when all have succeeded. Raises UserError and PipelineFailed.
    """
    root = root.resolve()
    seeds = sorted(set(seeds or [0, 1, 2]))
    params = resolve_profile(profile_path(profile, root), recipes or ["all"])
    failures: list[str] = []
    trees = {seed: _worktree(root, f"{profile}-seed-{seed}", {**params, "seed": seed}) for seed in seeds}
    for seed, tree in trees.items():
        try:
            pipeline(max_parallel=max_parallel, root=tree)
        except PipelineFailed as error:
            failures.append(f"seed {seed}: {error}")
    if failures:
        raise PipelineFailed("; ".join(failures))
    compared = load_params(trees[seeds[0]] / "params.yaml")
    out, mirrors = root / REPORT / profile, dict(compared.questions.test)
    write_reproduction(trees, out, compared.compare, mirrors, compared.pair, compared.report.first)
    write_sizes(root / REPORT)


def _worktree(root: Path, name: str, params: dict[str, object]) -> Path:
    """A worktree at the current commit with these parameters, and its outputs from the cache if there are."""
    tree = root / RUNS / name

    def run(*command: str, cwd: Path = root) -> str:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
        return done.stdout.strip()

    head = run("git", "rev-parse", "HEAD")
    lock = (tree / "dvc.lock").read_text() if (tree / "dvc.lock").is_file() else None
    run("git", "worktree", "prune")
    if tree.exists():
        run("git", "checkout", "--force", "--detach", head, cwd=tree)
    else:
        run("git", "worktree", "add", "--detach", str(tree), head)
    if lock:  # what this seed has already made
        (tree / "dvc.lock").write_text(lock)
    dvc = (sys.executable, "-m", "dvc")
    cache = run(*dvc, "cache", "dir")
    run(*dvc, "cache", "dir", "--local", str((root / cache).resolve()), cwd=tree)
    head_line = f"# Written by `python -m flows.reproduce`: seed {params['seed']}.\n"
    (tree / "params.yaml").write_text(head_line + yaml.safe_dump(params, sort_keys=False, allow_unicode=True))
    return tree


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
