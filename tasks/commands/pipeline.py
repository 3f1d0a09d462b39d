"""Run the pipeline: `python -m tasks.commands.pipeline [arguments of dvc repro]`.

The same as `dvc repro`, with a run in MLflow above the runs of the stages. Without options as many stages run
side by side as `workers.side_by_side` says.
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dgpo_core.errors import UserError
from tasks.commands.preflight import preflight
from tasks.project.dvc import LockFilter, at_work, refuse_second, require_dvc
from tasks.project.graph import Stage, read_dag, select
from tasks.project.process import exit_on_signals
from tasks.project.servers import adopt
from tasks.project.side_by_side import run_stages
from tasks.tracking.lineage import settings
from tasks.tracking.runs import PIPELINE_RUN, Pipeline


def main(arguments: list[str]) -> int:
    """Run the pipeline. Return the exit code of `dvc repro`, or 2 for what keeps every run from starting.

    Below a pipeline or a flow, which has looked at the parameters and opened MLflow's run, only DVC runs.
    """
    exit_on_signals()
    if {"-h", "--help"}.intersection(arguments):
        print(__doc__)
        return reproduce(["--help"])
    below = PIPELINE_RUN in os.environ
    try:
        adopt()
        require_dvc()
        if not below:
            preflight()
        stages = {} if below else together(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if below:
        return reproduce(arguments, ["--wait-for-lock"])  # stages beside it take DVC's lock for moments
    pipeline = Pipeline("pipeline", {"arguments": " ".join(arguments)})
    os.environ[PIPELINE_RUN] = pipeline.run_id or ""
    code, names = 1, list(stages)
    try:
        if stages:
            code = run_stages(stages, side_by_side())
        else:
            # Not in a child: when this process is killed, the stage's parent is gone and it ends.
            code = reproduce(arguments)
            names = planned(arguments)
    finally:
        pipeline.close(code == 0, names)
    return code


def side_by_side(root: Path = Path()) -> int:
    """Return how many stages run at a time; one where params.yaml cannot be read, which its readers say."""
    params = settings(root)
    return params.workers.side_by_side if params else 1


def together(arguments: list[str]) -> dict[str, Stage]:
    """Return the stages that are to run side by side; none where DVC does it all: alone, or with options.

    Raises UserError where DVC cannot read its files, or somebody else is at work here.
    """
    if side_by_side() == 1 or any(argument.startswith("-") for argument in arguments):
        return {}
    refuse_second()
    stages = read_dag(Path())
    try:
        return select(stages, arguments)
    except UserError:
        return {}  # a file, say, which is a target for DVC


def reproduce(arguments: list[str], options: Sequence[str] = ()) -> int:
    """Run `dvc repro`. Return its exit code, or 2 where another run holds what it needs, and say which."""
    from dvc.cli import main as dvc

    locked = LockFilter()
    handlers = logging.getLogger("dvc").handlers
    for handler in handlers:
        handler.addFilter(locked)
    try:
        code = int(dvc([*options, "repro", *arguments]))
    finally:
        for handler in handlers:
            handler.removeFilter(locked)
    if not locked.hit:
        return code
    print(f"error: {at_work()}", file=sys.stderr, flush=True)
    return 2


def planned(arguments: list[str]) -> list[str]:
    """Return the stages that `dvc repro` with these arguments looks at, in order; none if it refuses."""
    from dvc.cli import DvcParserError, parse_args
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # DVC has said already what is wrong with them
            asked = parse_args(["repro", *arguments])
        with Repo() as repo:
            graph = get_active_graph(repo.index.graph)
            stages = collect_stages(repo, asked.targets or ["dvc.yaml"], asked.recursive, asked.glob)
            if not asked.single_item:
                stages = plan_repro(graph, stages, pipeline=asked.pipeline, downstream=asked.downstream)
            return [stage.addressing for stage in stages if stage.cmd]
    except (DvcException, DvcParserError, OSError):
        return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
