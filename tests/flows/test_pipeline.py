"""The flow on a real Prefect server over a small, real git + DVC repository."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.errors import UserError
from tests.conftest import ROOT, alive, commit_all
from tests.flows.conftest import task_runs
from tests.flows.restarts import restarted

pytestmark = pytest.mark.thorough

# Each stage notes when it starts and ends: order and overlap are facts in a file, not guesses from durations.
STAGE = """
import sys, time
from pathlib import Path

name, wait = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
note = lambda what: open("log.txt", "a").write(f"{what} {name}\\n")
note("start")
for _ in range(1200):  # a generous limit that only keeps a broken test from hanging
    if not wait or Path(wait).exists():
        break
    time.sleep(0.05)
if Path(f"{name}.fail").exists():
    sys.exit(f"{name} fails")
Path(f"{name}.txt").write_text(name)
note("end")
"""

PIPELINE = """
stages:
  last: {cmd: python stage.py last, deps: [left.txt, right.txt], outs: [last.txt]}
  right: {cmd: python stage.py right, deps: [first.txt], outs: [right.txt]}
  left: {cmd: python stage.py left, deps: [first.txt], outs: [left.txt]}
  first: {cmd: python stage.py first, outs: [first.txt], meta: {timeout_minutes: 5}}
"""


@pytest.fixture
def repository(dvc_repository: Path) -> Path:
    Path("stage.py").write_text(STAGE)
    Path("dvc.yaml").write_text(PIPELINE)
    return dvc_repository


def run_flow(**arguments: Any) -> dict[str, tuple[str, int]]:
    """Run the flow; return {stage: (state's name, number of attempts)} as the server has them."""
    from flows.pipeline import stages
    from flows.settings import PipelineSettings

    settings = PipelineSettings(**arguments)
    state = stages(settings=settings, retry_delay_seconds=0, return_state=True)
    flow_run = state.state_details.flow_run_id
    for _ in range(300):  # the server learns of task runs by events, a little later
        runs = task_runs(flow_run)
        if runs and all(run.state and run.state.is_final() for run in runs):
            break
        time.sleep(0.1)
    return {**{run.name: (run.state_name, run.run_count) for run in runs}, "flow": (state.name or "", 1)}


def log() -> list[str]:
    return Path("log.txt").read_text().splitlines()


def names(found: dict[str, tuple[str, int]]) -> dict[str, str]:
    return {stage: state for stage, (state, _) in found.items()}


def test_a_flow_starts_without_what_only_stages_need() -> None:
    heavy = ("torch", "transformers", "mlflow", "qdrant_client", "pandas")
    code = f"import sys, flows.pipeline, flows.deploy; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_order_then_nothing_to_do_then_only_what_changed(api: str, repository: Path) -> None:
    done = names(run_flow())
    assert done == dict.fromkeys(["first", "left", "right", "last", "flow"], "Completed")
    assert log()[:2] == ["start first", "end first"]
    assert log()[-2:] == ["start last", "end last"]
    assert [line.split()[0] for line in log()] == ["start", "end"] * 4  # max_parallel is 1
    up_to_date = subprocess.run(["dvc", "status"], capture_output=True, text=True, check=True)
    assert "up to date" in up_to_date.stdout

    again = names(run_flow())
    assert again == {**dict.fromkeys(["first", "left", "right", "last"], "Unchanged"), "flow": "Completed"}
    assert len(log()) == 8

    pipeline = Path("dvc.yaml").read_text().replace("stage.py left,", "stage.py left '',")
    Path("dvc.yaml").write_text(pipeline)
    changed = names(run_flow(targets=["left"]))
    assert changed == {"first": "Unchanged", "left": "Completed", "flow": "Completed"}

    Path("left.txt").unlink()  # its content is in DVC's cache
    assert names(run_flow(targets=["left"]))["left"] == "Restored"
    assert len(log()) == 10


def test_a_stage_that_none_waits_for_does_not_hold_up_others(api: str, repository: Path) -> None:
    aside = "  aside: {cmd: python stage.py aside, deps: [first.txt], outs: [aside.txt]}\n"
    Path("dvc.yaml").write_text(PIPELINE.replace("  last:", f"{aside}  last:"))
    assert names(run_flow())["aside"] == "Completed"
    started = [line.split()[1] for line in log() if line.startswith("start")]
    assert started[0] == "first" and started[-2:] == ["last", "aside"]


def test_independent_stages_side_by_side(api: str, repository: Path) -> None:
    # Each of the two waits for the other's start: they can only end if they run together.
    text = Path("stage.py").read_text().replace('note("start")', 'note("start"); Path(f"{name}.on").touch()')
    Path("stage.py").write_text(text)
    text = PIPELINE.replace("stage.py left", "stage.py left right.on")
    Path("dvc.yaml").write_text(text.replace("stage.py right", "stage.py right left.on"))
    assert names(run_flow(max_parallel=2))["flow"] == "Completed"
    assert {line.split()[0] for line in log()[2:4]} == {"start"}


def test_failure_stops_only_what_needs_it(api: str, repository: Path) -> None:
    Path("right.fail").touch()
    found = run_flow()
    completed = dict.fromkeys(["first", "left"], "Completed")
    assert names(found) == {**completed, "right": "Failed", "last": "NotReady", "flow": "Failed"}
    assert found["right"][1] == 1  # not retryable, not retried
    assert not Path("right.txt").exists()
    assert "| right | Failed |" in artifact() and "| last | NotReady |" in artifact()
    Path("right.fail").unlink()
    assert names(run_flow()).items() >= {"flow": "Completed", "left": "Unchanged"}.items()


FLAKY = """
from pathlib import Path
from dgpo_core.errors import InfrastructureError
from tasks.stages.stage import main, stage

def run():
    with stage("flaky", config={}, outputs=[Path("flaky.txt")]) as current:
        tries = current.state / "tries"
        count = len(tries.read_text()) if tries.exists() else 0
        tries.write_text("x" * (count + 1))
        if count < FAILURES:
            raise InfrastructureError("the retriever does not answer")
        current.output(Path("flaky.txt")).write_text(f"continued after {count}")

main(run)
"""


def test_infrastructure_failures_are_retried_and_the_state_is_kept(api: str, repository: Path) -> None:
    Path("flaky.py").write_text(FLAKY.replace("FAILURES", "1"))
    Path("dvc.yaml").write_text("stages:\n  flaky: {cmd: python flaky.py, outs: [flaky.txt]}\n")
    Path("reports").mkdir()
    Path("reports/results.json").write_text('{"dgpo": {"nq": {"em": 0.5}}}')
    assert run_flow() == {"flaky": ("Completed", 2), "flow": ("Completed", 1)}
    assert Path("flaky.txt").read_text() == "continued after 1"
    assert "| EM | dgpo |" in artifact() and "| nq | 0.500 |" in artifact()


def test_retries_end(api: str, repository: Path) -> None:
    Path("flaky.py").write_text(FLAKY.replace("FAILURES", "9"))
    Path("dvc.yaml").write_text(
        "stages:\n  flaky: {cmd: python flaky.py, outs: [flaky.txt], meta: {retries: 1}}\n"
    )
    assert run_flow() == {"flaky": ("Failed", 2), "flow": ("Failed", 1)}
    assert "flaky: infrastructure: the retriever does not answer" in artifact()


def test_timeout_ends_the_stage(api: str, repository: Path) -> None:
    Path("dvc.yaml").write_text(
        "stages:\n  slow: {cmd: python stage.py slow never, outs: [slow.txt], "
        "meta: {timeout_minutes: 0.05}}\n"
    )
    assert names(run_flow()) == {"slow": "Failed", "flow": "Failed"}
    assert "not done after 0.05 minutes" in artifact()


def test_a_stage_that_wants_more_gpus_than_there_are_says_what_to_do(api: str, repository: Path) -> None:
    from prefect import get_client

    from flows.execution import GPU_LIMIT

    Path("dvc.yaml").write_text(
        "stages:\n  big: {cmd: python stage.py big, outs: [big.txt], meta: {gpus: 2}}\n"
    )
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, 1)
        try:
            assert run_flow() == {"big": ("Failed", 1), "flow": ("Failed", 1)}
            assert "big: wants 2 slots of the limit `dgpo-gpu`" in artifact()
            assert "`dgpo deploy --gpus 2`" in artifact() and not Path("log.txt").exists()
            client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, 2)
            assert names(run_flow()) == {"big": "Completed", "flow": "Completed"}
        finally:
            client.delete_global_concurrency_limit_by_name(GPU_LIMIT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_flow_leaves_no_stage(api: str, repository: Path, number: signal.Signals) -> None:
    """A stage of the project's kind ends even with SIGKILL to the flow; others end with its cancellation."""
    Path("work.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\nsys.argv[0] = '-m'\nimport tasks\n"
        "Path('pid.part').write_text(str(os.getpid()))\nos.replace('pid.part', 'pid')\ntime.sleep(600)\n"
    )
    Path("dvc.yaml").write_text("stages:\n  work: {cmd: exec python work.py, outs: [work.txt]}\n")
    environment = {**os.environ, "PREFECT_API_URL": api}
    with subprocess.Popen([sys.executable, "-m", "flows.pipeline"], env=environment) as flow:
        while not Path("pid").exists():
            assert flow.poll() is None
            time.sleep(0.05)
        flow.send_signal(number)
        assert flow.wait() != 0
    pid = int(Path("pid").read_text())
    for _ in range(600):
        if not alive(pid):
            return
        time.sleep(0.05)
    pytest.fail("the stage outlived the flow")


def test_bad_arguments(api: str, repository: Path) -> None:
    environment = {**os.environ, "PREFECT_API_URL": api}
    command = [sys.executable, "-m", "flows.pipeline", "--target", "nothing"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "error: no such stage: nothing" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    result = subprocess.run(
        [*command[:3], "--max-parallel", "0"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "--max-parallel" in result.stderr


@pytest.mark.parametrize(("restarts", "outcome"), [(5, "Completed"), (6, "Failed")])
def test_five_restarts_and_no_more(api: str, repository: Path, restarts: int, outcome: str) -> None:
    from flows.pipeline import pipeline

    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    commit_all()
    state = restarted(pipeline, restarts, {"settings": {"dry_run": True}})
    assert state.name == outcome
    assert outcome == "Completed" or "was started 6 times" in str(state.message)


def test_port_that_is_taken(workplace: Path) -> None:
    from flows.server import local_server

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="does not start"), local_server(taken.getsockname()[1]):
            pass


def test_a_running_server_is_used_and_left(api: str, workplace: Path) -> None:
    from flows.server import answers, local_server

    port = int(api.split(":")[2].split("/")[0])
    with local_server(port) as url:
        assert url == api
    assert answers(api)


def artifact() -> str:
    """Read the newest summary on the server."""
    from prefect import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    ours = ArtifactFilter(key=ArtifactFilterKey(any_=["pipeline"]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ours, sort=ArtifactSort.CREATED_DESC, limit=1)
    return str(found[0].data)
