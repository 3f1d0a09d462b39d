"""Run the pipeline: `python -m tasks.commands.pipeline [arguments of dvc repro]`.

The same as `dvc repro`, with a run in MLflow above the runs of the stages.
"""

import contextlib
import io
import logging
import os
import sys

from dgpo_core.errors import UserError
from tasks.commands.preflight import preflight
from tasks.project.dvc import LockFilter, at_work, require_dvc
from tasks.project.process import exit_on_signals
from tasks.project.servers import adopt
from tasks.tracking.runs import PIPELINE_RUN, Pipeline


def main(arguments: list[str]) -> int:
    """Run the pipeline. Return the exit code of `dvc repro`, or 2 for what keeps every run from starting.

    Under a flow, which has opened the pipeline's run in MLflow, none is opened.
    """
    exit_on_signals()
    if {"-h", "--help"}.intersection(arguments):
        print(__doc__)
        return reproduce(["--help"])
    try:
        adopt()
        require_dvc()
        preflight()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get(PIPELINE_RUN):
        return reproduce(arguments)
    pipeline = Pipeline("pipeline", {"arguments": " ".join(arguments)})
    if pipeline.run_id:
        os.environ[PIPELINE_RUN] = pipeline.run_id
    code, stages = 1, list[str]()
    try:
        # In this process and not in a child of it: when it is killed, the stage's parent is gone and it ends.
        code = reproduce(arguments)
        stages = planned(arguments)
    finally:
        pipeline.close(code == 0, stages)
    return code


def reproduce(arguments: list[str]) -> int:
    """Run `dvc repro`. Return its exit code, or 2 where another run holds what it needs, and say which."""
    from dvc.cli import main as dvc

    locked = LockFilter()
    handlers = logging.getLogger("dvc").handlers
    for handler in handlers:
        handler.addFilter(locked)
    try:
        code = int(dvc(["repro", *arguments]))
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
