"""The paper's comparison: every recipe, several seeds, and a report with a verdict on each of its claims.

    dgpo reproduce --seed 0 1 2 [--recipe dgpo ...] [--max-parallel 2]

Each seed runs in a git worktree of its own at the current commit (`.runs/<profile>-seed-<n>`, kept), with the
project's DVC cache: what no seed changes is made once, and a killed run continues where it was.
"""

import contextlib
import os
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from dgpo_core.config.params import NO_RECIPES, PARAMS, load_params, resolve_profile
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.reporting.reproduction.report import pool_seeds
from dgpo_core.reporting.reproduction.seeds import SeedRecord, keep
from dgpo_core.reporting.reproduction.sizes import write_sizes
from flows.pipeline import PipelineFailed, refuse_endless_restarts, stages, warn_of_changes
from flows.settings import PipelineSettings
from flows.workspace import RUNS, enter_project, one_at_a_time, open_workspace, plain_name
from tasks.commands.cli import run_as
from tasks.commands.use import profile_path
from tasks.project.git import git

REPORT, SEEDS = Path("reproduction"), "seeds"


@flow(name="reproduce", persist_result=False)
def reproduce(
    profile: str = "tiny",
    recipes: list[str] | None = None,
    seeds: list[int] | None = None,
    max_parallel: int = 1,
) -> None:
    """Run the stages for every seed, then write the report of all of them.

    `recipes` are rows of the paper's table (`all`, the default: every one) or of the commit's params.yaml. A
    seed that fails does not stop the others; the report is written when all have succeeded. Raises UserError
    and PipelineFailed.
    """
    root = enter_project()
    refuse_endless_restarts()
    warn_of_changes(root)
    names = {seed: plain_name(f"{profile}-seed-{seed}") for seed in sorted(set(seeds or [0, 1, 2]))}
    with contextlib.ExitStack() as locks:
        for name in names.values():  # in this order, so that no two runs wait for each other
            locks.enter_context(one_at_a_time(root, name))
        trees = {seed: _worktree(root, name, profile, recipes, seed) for seed, name in names.items()}
        _run_all(trees, max_parallel)
        out = root / REPORT / profile
        pool_seeds([keep(tree, out / SEEDS, _record(tree)) for tree in trees.values()], out)
    create_markdown_artifact((out / "results.md").read_text(encoding="utf-8"), key="reproduction")
    write_sizes(root / REPORT, root / REPORT)


def _run_all(trees: dict[int, Path], max_parallel: int) -> None:
    failures: list[str] = []
    for seed, tree in trees.items():
        try:
            stages(tree, PipelineSettings(max_parallel=max_parallel))
        except PipelineFailed as error:
            failures.append(f"seed {seed}: {error}")
    if failures:
        raise PipelineFailed("; ".join(failures))


def _record(tree: Path) -> SeedRecord:
    params = load_params(tree / PARAMS)
    return SeedRecord(
        profile=params.profile,
        seed=params.seed,
        commit=git("rev-parse", "HEAD", cwd=tree),
        models=params.compare,
        mirrors=dict(params.questions.test),
        pair=params.pair,
        first=dict(params.report.first),
        starts={name: row.start for name, row in params.recipes.all.items()},
    )


def _worktree(root: Path, name: str, profile: str, recipes: list[str] | None, seed: int) -> Path:
    """Open a seed's worktree at the current commit, whose profile counts, with what it has already made."""
    is_new = not (root / RUNS / name).exists()
    workspace = open_workspace(root, name, keep_lock=True)
    try:
        path = workspace.tree / PARAMS  # the commit's
        own = load_params(path).recipes if path.is_file() else NO_RECIPES
        params = resolve_profile(profile_path(profile, workspace.tree), recipes or ["all"], own)
        comment = f"Written by `dgpo reproduce`: seed {seed}."
        workspace.write_params({**params, "seed": seed}, comment)
    except (UserError, ValueError) as error:
        if is_new:
            workspace.remove()
        said = " ".join(str(error).split())
        raise UserError(f"commit {workspace.commit[:8]}, which is what runs: {said}") from error
    return workspace.tree


def run(
    profile: str, recipe: list[str] | None, seed: list[int] | None, max_parallel: int, **_server: object
) -> None:
    """Reproduce the paper's comparison now: `dgpo reproduce`."""
    # stages side by side would otherwise fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max_parallel)))
    try:
        reproduce(profile, recipe and list(recipe), seed and list(seed), max_parallel)
    except PipelineFailed as error:
        raise InfrastructureError(str(error)) from None
    print(f"report: {REPORT / profile / 'index.html'}; all profiles: {REPORT / 'sizes.html'}")


if __name__ == "__main__":
    run_as("reproduce", run)
