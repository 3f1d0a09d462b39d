"""A training stage that trains nothing: `python -m tests.tasks.toy_stage <how it is to end>`."""

import os
import signal
import sys
import time
from pathlib import Path

from dgpo_core.errors import UserError
from dgpo_core.training import parallel
from tasks.project.process import die_with_parent
from tasks.stages.launch import in_processes
from tasks.stages.stage import main, stage


def run(ending: str) -> None:
    with stage("toy", config={}, outputs=[Path("out")]) as current:
        processes = parallel.all_sum({"one": 1.0})["one"]
        if current.leads:
            current.output(Path("out")).write_text(f"{processes:g}")
        Path(f"pid-{parallel.rank()}").write_text(str(os.getpid()))
        second = parallel.rank() == 1
        if ending == "wrong":
            raise UserError("compute: a setting that no process can have")
        if ending == "broken" and second:
            raise RuntimeError("only the second process broke")
        if ending == "killed" and second:
            os.kill(os.getpid(), signal.SIGKILL)
        if ending == "waits":
            time.sleep(600)
        parallel.wait()


if __name__ == "__main__":
    die_with_parent()
    main(lambda: in_processes(lambda: run(sys.argv[1])))
