"""Run the pipeline: `python -m tasks.pipeline [arguments of dvc repro]`.

The same as `dvc repro`, with a run in MLflow above the runs of the stages.
"""

import os
import sys

from dgpo_core.errors import UserError
from tasks.preflight import preflight
from tasks.process import exit_on_sigterm
from tasks.services import adopt
from tasks.tracking import PIPELINE_RUN, Pipeline


def main(arguments: list[str]) -> int:
    """Exit code of `dvc repro`, or 2 for parameters with which nothing can run.

    Under a flow, which has opened the pipeline's run, it opens none.
    """
    from dvc.cli import main as dvc

    exit_on_sigterm()
    try:
        adopt()
        preflight()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get(PIPELINE_RUN):
        return int(dvc(["repro", *arguments]))
    pipeline = Pipeline("pipeline", {"arguments": " ".join(arguments)})
    if pipeline.run_id:
        os.environ[PIPELINE_RUN] = pipeline.run_id
    code = 1
    try:
        # In this process and not in a child of it: when it is killed, the stage's parent is gone and it ends.
        code = int(dvc(["repro", *arguments]))
    finally:
        pipeline.close(succeeded=code == 0)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
