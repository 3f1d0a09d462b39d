"""`python -m tasks.commands.pipeline` on a small, real DVC repository."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgpo_core.errors import UserError
from tasks.commands.pipeline import planned
from tasks.project.dvc import refuse_second
from tasks.project.graph import read_dag
from tasks.tracking.runs import connect

STAGE = """
import sys
from pathlib import Path
from tasks.stages.stage import main, stage

def run():
    name = sys.argv[1]
    with stage(name, config={}, inputs=list(map(Path, sys.argv[2:])), outputs=[Path(f"{name}.txt")]):
        Path(f"{name}.txt").write_text(name)

main(run)
"""

PIPELINE = """
stages:
  pipe_first: {cmd: exec python stage.py pipe_first, outs: [pipe_first.txt]}
  pipe_last:
    cmd: exec python stage.py pipe_last pipe_first.txt
    deps: [pipe_first.txt]
    outs: [pipe_last.txt]
  alone: {cmd: exec python stage.py alone, outs: [alone.txt]}
"""


@pytest.fixture
def repository(dvc_repository: Path) -> Path:
    Path("stage.py").write_text(STAGE)
    Path("dvc.yaml").write_text(PIPELINE)
    return dvc_repository


def test_plan_is_what_dvc_looks_at(repository: Path) -> None:
    assert set(planned([])) == {"pipe_first", "pipe_last", "alone"}
    assert planned(["pipe_last"]) == ["pipe_first", "pipe_last"]
    assert planned(["--single-item", "--force", "pipe_last"]) == ["pipe_last"]
    assert planned(["--downstream", "pipe_first"]) == ["pipe_first", "pipe_last"]
    assert planned(["nothing"]) == planned(["--nonsense"]) == []


@pytest.mark.thorough
def test_who_comes_second_is_told_who_is_at_work_and_where(repository: Path) -> None:
    Path("hold.py").write_text(
        "import time\nfrom pathlib import Path\nPath('on').touch()\n"
        "while not Path('off').exists(): time.sleep(0.05)\nPath('hold.txt').touch()\n"
    )
    Path("dvc.yaml").write_text("stages:\n  hold: {cmd: exec python hold.py, outs: [hold.txt]}\n")
    command = [sys.executable, "-m", "tasks.commands.pipeline"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as first:
        try:
            while not Path("on").exists():
                assert first.poll() is None
                time.sleep(0.05)
            second = subprocess.run(command, capture_output=True, text=True, timeout=120)
            for refused in (read_dag, refuse_second):
                with pytest.raises(UserError, match="at hold since"):
                    refused(repository)
        finally:
            Path("off").touch()
    said = f"error: another run is at work here, at hold since {time.strftime('%H:')}"
    assert second.returncode == 2
    assert said in second.stderr and f"(process {first.pid})" in second.stderr
    assert "rwlock" not in second.stdout + second.stderr
    assert first.returncode == 0
    refuse_second(repository)  # it has ended


@pytest.mark.slow
def test_the_second_run_points_to_the_first(repository: Path) -> None:
    def run() -> dict[str, dict[str, str]]:
        command = [sys.executable, "-m", "tasks.commands.pipeline", "pipe_last"]
        subprocess.run(command, check=True, capture_output=True)
        client = connect()
        experiment = client.get_experiment_by_name("dgpo")
        assert experiment
        newest = "attributes.start_time DESC"
        (parent,) = client.search_runs(
            [experiment.experiment_id], "tags.arguments = 'pipe_last'", order_by=[newest], max_results=1
        )
        rows = json.loads(Path(client.download_artifacts(parent.info.run_id, "stages.json")).read_text())
        return {row["stage"]: row for row in rows["stages"]}

    first = run()
    assert {name: row["state"] for name, row in first.items()} == dict.fromkeys(
        ["pipe_first", "pipe_last"], "executed"
    )
    # DVC's own digest is the data set's, and the tag's by which the output is found again
    inputs = connect().get_run(first["pipe_last"]["run_id"]).inputs
    assert inputs
    (dataset,) = inputs.dataset_inputs
    tags = connect().get_run(first["pipe_first"]["run_id"]).data.tags
    assert dataset.dataset.digest == tags["dvc.outputs.pipe_first.txt"]
    Path("dvc.yaml").write_text(PIPELINE.replace("stage.py pipe_last", "stage.py  pipe_last"))
    second = run()
    assert second["pipe_first"]["state"] == "unchanged"
    assert second["pipe_first"]["run_id"] == first["pipe_first"]["run_id"]
    assert second["pipe_last"]["state"] == "executed"
    assert second["pipe_last"]["run_id"] != first["pipe_last"]["run_id"]
