"""Sixteen pipelines that start at once on one checkout with two workers; one of them is killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import ROOT, commit_all, git, make_workplace
from tests.flows import conftest
from tests.flows.conftest import Server, wait

pytestmark = pytest.mark.slow

RUNS, GPUS = 16, 2
VICTIM = 0  # the run whose process is killed

# It ends with its flow, as real stages do; the log is outside of all worktrees. The first attempt of the run
# that is to be killed waits for that.
STAGE = """
import os, sys, time
from pathlib import Path
sys.argv[0] = "-m"
import tasks
import yaml

name, log = sys.argv[1], Path(os.environ["STAGE_LOG"])
beta = yaml.safe_load(Path("params.yaml").read_text())["reinforce"]["beta"] if name == "train" else ""

def note(what):
    with log.open("a") as file:
        file.write(f"{what} {name} {beta}\\n")

note("start")
while name == "train" and beta == 0.5 and log.with_name("hold").exists():
    time.sleep(0.05)
time.sleep(0.5)
Path(f"{name}.txt").write_text(f"{name} beta={beta}")
note("end")
"""
# Its workers are those of the pool `cpu`, whose trainings take slots all the same.
PIPELINE = {**conftest.PIPELINE, "train": conftest.PIPELINE["train"] | {"meta": {"gpus": 1}}}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a checkout with two workers, which take four runs each; servers and stores are its own."""
    root = tmp_path / "checkout"
    root.mkdir()
    make_workplace(root, monkeypatch, f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("STAGE_LOG", str(tmp_path / "log.txt"))
    server = Server(tmp_path / "prefect")
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    monkeypatch.setenv("PREFECT_WORKER_QUERY_SECONDS", "1")
    git("init", "-q", "-b", "main")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)
    Path("stage.py").write_text(STAGE)
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": PIPELINE}))
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    Path(".gitignore").write_text("/.runs/\n/.state/\n/runs/\n/*.txt\n")
    commit_all()
    subprocess.run([sys.executable, "-m", "flows.deploy", "--gpus", str(GPUS)], check=True)
    output = (tmp_path / "workers.txt").open("w")
    command = [sys.executable, "-m", "flows.worker", "cpu", "--runs", "4"]
    workers = [
        subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True) for _ in range(2)
    ]
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: server.url}):
        yield root
    for worker in workers:
        family = psutil.Process(worker.pid).children(recursive=True)
        worker.terminate()
        psutil.wait_procs(family, 60)
        worker.wait()
    server.kill()


def betas() -> list[float]:
    return [0.5 + number / 100 for number in range(RUNS)]


def read(runs: list[Any]) -> list[Any]:
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    ours = FlowRunFilter(id=FlowRunFilterId(any_=[run.id for run in runs]))
    with get_client(sync_client=True) as client:
        return list(client.read_flow_runs(flow_run_filter=ours))


def slots() -> int:
    from prefect import get_client

    with get_client(sync_client=True) as client:
        return int(client.read_global_concurrency_limit_by_name("dgpo-gpu").active_slots)


def process_of(run: Any) -> psutil.Process:
    """Find the process that executes a flow run."""
    for process in psutil.process_iter(["cmdline"]):
        executes = "prefect.engine" in " ".join(process.info["cmdline"] or [])
        if executes and process.environ().get("PREFECT__FLOW_RUN_ID") == str(run.id):
            return process
    pytest.fail("no process executes the run")


def test_sixteen_pipelines_at_once_and_one_is_killed(root: Path) -> None:
    from prefect.deployments import run_deployment

    log, hold = root.parent / "log.txt", root.parent / "hold"
    hold.touch()
    settings = [{"overrides": [f"reinforce.beta={beta}"], "promote": False} for beta in betas()]
    runs: list[Any] = [
        run_deployment("pipeline/on-demand", parameters={"settings": each}, timeout=0) for each in settings
    ]

    started = f"start train {betas()[VICTIM]}"
    wait(lambda: log.exists() and started in log.read_text().splitlines(), "the victim's training")
    process_of(runs[VICTIM]).send_signal(signal.SIGKILL)
    hold.unlink()
    final = ("Completed", "Failed", "Cancelled")
    wait(lambda: all(run.state_name in final for run in read(runs)), "the end of all")
    said = {run.name: (run.state_name, run.state.message) for run in read(runs)}
    assert {state for state, _ in said.values()} == {"Completed"}, said
    assert {run.id: run.run_count for run in read(runs)}[runs[VICTIM].id] == 2

    # every run has what its own settings give, on its own branch, and the checkout has nothing
    for run, beta in zip(runs, betas(), strict=True):
        lock = yaml.safe_load(git("show", f"runs/{run.name}:dvc.lock", cwd=root))
        (out,) = lock["stages"]["train"]["outs"]
        kept = root / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]
        assert kept.read_text() == f"train beta={beta}"
    assert not git("status", "--porcelain", cwd=root)
    assert not list((root / ".runs").iterdir())
    assert git("worktree", "list", cwd=root).count("\n") == 0

    # each trained once, and the victim twice; never more at once than there are slots
    lines = [line.split() for line in log.read_text().splitlines()]
    trained = [beta for what, name, *beta in lines if (what, name) == ("start", "train")]
    assert len(trained) == RUNS + 1 and trained.count([str(betas()[VICTIM])]) == 2
    assert most_at_once(lines) <= GPUS
    wait(lambda: slots() == 0, "the end of the lease of the process that was killed")

    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("dgpo")
    assert experiment
    statuses = [run.info.status for run in client.search_runs([experiment.experiment_id])]
    assert set(statuses) <= {"FINISHED", "KILLED"}, statuses


def most_at_once(lines: list[list[str]]) -> int:
    """Count the trainings side by side; one that was killed wrote no end."""
    training: set[str] = set()
    most = 0
    for what, name, *beta in lines:
        if name == "train":
            training = training | {*beta} if what == "start" else training - {*beta}
            most = max(most, len(training))
    return most
