"""Deployments on a real server: two workers with a clone each, a git remote and a DVC remote (a folder)."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import ROOT, commit_all, git, make_workplace
from tests.flows.conftest import PIPELINE, task_runs

pytestmark = pytest.mark.slow

WAIT = 240  # seconds: only keeps a broken test from hanging

# `train` says where it runs, and keeps its progress as real stages do; the log is outside of all clones.
STAGE = """
import os, sys, time
from pathlib import Path
import yaml
from tasks.stages.stage import main, stage

name = sys.argv[1]
OUT = Path(f"{name}.txt")

def run():
    params = yaml.safe_load(Path("params.yaml").read_text())
    log = Path(params["world"]["folder"] if "folder" in params["world"] else os.environ["STAGE_LOG"])
    with stage(name, config={"beta": params["reinforce"]["beta"]}, outputs=[OUT]) as current:
        done = current.state / "steps"
        for step in range(len(done.read_text()) if done.exists() else 0, 4):
            with log.open("a") as file:
                file.write(f"{name} {step} {os.environ.get('DGPO_POOL')} {os.environ['DGPO_ROOT']}\\n")
            while name == "train" and step == 2 and (log.parent / "hold").exists():
                time.sleep(0.05)
            done.write_text("x" * (step + 1))
        OUT.write_text(f"{name} beta={params['reinforce']['beta']}")

main(run)
"""


@dataclass
class Site:
    """A project with a git remote and two clones; `log` is what its stages have written."""

    folder: Path
    environment: dict[str, str]

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def git(self, *arguments: str, clone: str = "cpu") -> str:
        return git(*arguments, cwd=self.folder / clone)

    def start_worker(self, pool: str) -> subprocess.Popen[bytes]:
        environment = {
            **self.environment,
            "DGPO_ROOT": str(self.folder / pool),
            "DGPO_POOL": pool,
            "DGPO_PUSH": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", f"{pool}-pool"]
        output = (self.folder / f"worker-{pool}.log").open("a")
        return subprocess.Popen(
            [*command, "--name", f"{pool}-{time.time_ns()}"],
            env=environment,
            cwd=self.folder / pool,
            start_new_session=True,
            stdout=output,
            stderr=output,
        )


@pytest.fixture(scope="module")
def site(api: str, mlflow_store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Deploy the project and start a worker for each pool."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        origin = folder / "origin"
        origin.mkdir()
        make_workplace(origin, patch, mlflow_store)
        patch.setenv("STAGE_LOG", str(folder / "log.txt"))
        patch.setenv("PREFECT_API_URL", api)
        git("init", "-q", "-b", "main", cwd=origin)
        for arguments in (["init", "-q"], ["remote", "add", "-d", "storage", str(folder / "storage")]):
            subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=origin, check=True)
        (origin / "stage.py").write_text(STAGE)
        (origin / "dvc.yaml").write_text(yaml.safe_dump({"stages": PIPELINE}))
        (origin / "params.yaml").write_text((ROOT / "params.yaml").read_text())
        (origin / ".gitignore").write_text("/.runs/\n/.state/\n/runs/\n/*.txt\n")
        commit_all(cwd=origin)
        for clone in ("cpu", "gpu"):
            git("clone", "-q", origin, clone, cwd=folder)
        site = Site(folder, dict(os.environ))
        subprocess.run([sys.executable, "-m", "flows.deploy"], env=site.environment, check=True)
        workers = [site.start_worker(pool) for pool in ("cpu", "gpu")]
        try:
            yield site
        finally:
            for worker in workers:
                end(worker)


def end(worker: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    """End a worker and everything that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
        worker.send_signal(number)
        _, alive = psutil.wait_procs(family, 0.1 if number == signal.SIGKILL else 30)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    worker.wait()


def start(name: str | None = None, /, **settings: Any) -> Any:
    """Start a run of the deployment, as the dashboard does; return its flow run."""
    from prefect.deployments import run_deployment

    parameters = {"settings": settings}
    return run_deployment("pipeline/on-demand", flow_run_name=name, parameters=parameters, timeout=0)


def flow_run(run: Any) -> Any:
    from prefect import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(run.id)


def state_of(run: Any) -> str:
    return str(flow_run(run).state_name)


def set_state(run: Any, state: Any) -> None:
    """Do what a button of the dashboard does."""
    from prefect import get_client

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, state)


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {WAIT} s: {what}")
        time.sleep(0.2)


def start_and_hold(site: Site, beta: float) -> Any:
    """Start a run whose training stays in its third step until the file `hold` is gone."""
    before = len(site.lines())
    (site.folder / "hold").touch()
    run = start(overrides=[f"reinforce.beta={beta}"])
    wait(lambda: ["train", "2"] in [line[:2] for line in site.lines()[before:]], "the third step")
    return run


def wait_for(run: Any, *names: str) -> str:
    wait(lambda: state_of(run) in names, f"{names}, but {state_of(run)}")
    return state_of(run)


FINAL = ("Completed", "Failed", "Cancelled", "Crashed")


def test_gpu_stage_runs_on_the_other_worker_and_only_what_changed_runs_again(site: Site) -> None:
    first = start()
    assert wait_for(first, *FINAL) == "Completed", (site.folder / "worker-cpu.log").read_text()[-3000:]
    ran = {line[0]: (line[2], line[3]) for line in site.lines()}
    cpu, gpu = str(site.folder / "cpu"), str(site.folder / "gpu")
    assert ran == {"data": ("cpu", cpu), "train": ("gpu", gpu), "report": ("cpu", cpu)}
    assert len(site.lines()) == 12  # nothing was run twice
    # results on a branch that both git and DVC can bring to anyone; the checkouts are as they were
    site.git("fetch", "-q", "origin", clone="gpu")
    lock = yaml.safe_load(site.git("show", f"origin/runs/{first.name}:dvc.lock", clone="gpu"))
    assert set(lock["stages"]) == {"data", "train", "report"}
    assert not (site.folder / "cpu" / "dvc.lock").exists()
    assert not site.git("status", "--porcelain")
    assert not list((site.folder / "cpu" / ".runs").iterdir())
    assert not list((site.folder / "gpu" / ".runs").iterdir())

    second = start(revision=f"runs/{first.name}", overrides=["reinforce.beta=0.5"], from_stage="train")
    assert wait_for(second, *FINAL) == "Completed"
    again = [line[0] for line in site.lines()[12:]]
    assert again == ["train"] * 4 + ["report"] * 4
    params = yaml.safe_load(site.git("show", f"runs/{second.name}:params.yaml"))
    assert params["reinforce"]["beta"] == 0.5
    assert "reinforce.beta=0.5" in site.git("log", "-1", "--format=%s", f"runs/{second.name}")


def test_a_crashed_run_starts_again_and_continues(site: Site) -> None:
    hold, before = site.folder / "hold", len(site.lines())
    run = start_and_hold(site, beta=0.25)
    victims = [p for p in psutil.process_iter(["cmdline"]) if is_flow_of(p, site.folder / "cpu")]
    assert victims
    for process in victims:
        process.kill()
    wait(lambda: flow_run(run).run_count == 2, "a second start")
    hold.unlink()
    assert wait_for(run, "Completed", "Failed", "Cancelled") == "Completed"
    # the GPU worker's part went on meanwhile, and the restarted run took it over
    steps = [line[:2] for line in site.lines()[before:] if line[0] == "train"]
    assert steps == [["train", str(step)] for step in range(4)]
    assert "beta=0.25" in site.git("log", "-1", "--format=%s", f"runs/{run.name}")


def test_cancelling_ends_stages_on_all_workers_and_leaves_what_can_go_on(site: Site) -> None:
    from prefect.states import AwaitingRetry, Cancelling

    hold, before = site.folder / "hold", len(site.lines())
    run = start_and_hold(site, beta=0.75)
    stages = [p for p in psutil.process_iter(["cmdline"]) if "stage.py" in (p.info["cmdline"] or [])]
    assert stages
    set_state(run, Cancelling())
    wait(lambda: not any(is_alive(process) for process in stages), "the stage's end")
    assert wait_for(run, "Cancelled", "Completed", "Failed") == "Cancelled"
    wait(lambda: task_states(run).get("train") not in (None, "Running"), "the task's end")
    assert task_states(run)["train"] == "Cancelled"
    hold.unlink()
    set_state(run, AwaitingRetry())
    assert wait_for(run, "Completed", "Failed") == "Completed"
    steps = [line[1] for line in site.lines()[before:] if line[0] == "train"]
    assert steps == ["0", "1", "2", "2", "3"]


def test_bad_settings_are_refused_with_the_key(site: Site) -> None:
    run = start(overrides=["reinforce.betta=0.5"])
    assert wait_for(run, *FINAL) == "Failed"
    found = "params.yaml: reinforce.betta: unknown key (found 0.5), did you mean reinforce.beta?"
    assert flow_run(run).state.message == f"this run's settings: {found}"
    assert "errors.pydantic.dev" not in (site.folder / "worker-cpu.log").read_text()
    assert not (site.folder / "cpu" / ".runs" / run.name).exists()
    assert not site.git("branch", "--list", f"runs/{run.name}")


def task_states(run: Any) -> dict[str, str]:
    """Return {stage: name of its task's state}."""
    return {task.name: task.state_name or "" for task in task_runs(run.id)}


def is_flow_of(process: psutil.Process, root: Path) -> bool:
    """Tell whether it is a flow run that the worker of `root` has started."""
    with contextlib.suppress(psutil.Error):
        command = process.info["cmdline"] or []
        return "prefect.engine" in " ".join(command) and process.environ().get("DGPO_ROOT") == str(root)
    return False


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
