"""MLflow runs: one for each executed stage, under the run of its pipeline.

The store is MLFLOW_TRACKING_URI (a server, say) or `mlflow.db` in the working directory, with artifacts in
`mlruns/` beside it. `connect` gives its client, to the other modules of this folder too. A stage works with
the store on a thread of its own, in order and in batches: a slow store does not slow training down, and a
broken one is warned of once and otherwise ignored. MLflow's own asynchronous logging would do for metrics
only, not for artifacts, traces and versions, and nothing limits how long its end takes.
"""

import json
import logging
import math
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

from tasks.project.files import content_hash
from tasks.project.paths import MODELS, PLOTS, REPORTS
from tasks.project.process import began
from tasks.tracking.lineage import changed_settings, flat, labels, locked_outputs, settings
from tasks.tracking.pages import describe as describe_experiment
from tasks.tracking.pages import run_name
from tasks.tracking.store import (
    EXPERIMENT,
    artifact_root,
    deleted_experiment,
    explained,
    local_path,
    prepare,
    require_answer,
    tracking_uri,
)
from tasks.tracking.summary import summarize

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

PIPELINE_RUN = "DGPO_PIPELINE_RUN"  # environment: id of the pipeline's run, the parent of the stages' runs
FLUSH_INTERVAL = 5.0  # seconds
CLOSE_TIMEOUT = 30.0  # seconds to wait for the last batches
MAX_METRICS, MAX_PARAMS = 1000, 100  # a request, by MLflow's limits
MAX_PARAM_LENGTH, MAX_WAITING = 6000, 100_000

QUIET = {  # environment, unless somebody has set it
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # a server that is gone would be retried for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with its password, if it has one
}

Job = Callable[["MlflowClient", str], object]


def connect() -> "MlflowClient":
    """Return a client of the store, which has our experiment.

    Raises what MLflow raises; UserError for a store or an experiment that cannot be used, with the cure; and
    InfrastructureError when a server does not answer, within seconds.
    """
    os.environ.update(QUIET | os.environ)
    uri = tracking_uri()
    prepare(uri)
    require_answer(uri)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(uri)
    if client.get_experiment_by_name(EXPERIMENT) is None:  # of a new server, or renamed by somebody
        path = local_path(uri)
        try:
            client.create_experiment(EXPERIMENT, artifact_root(path).as_uri() if path else None)
        except MlflowException:  # somebody else was faster
            if client.get_experiment_by_name(EXPERIMENT) is None:
                raise
    describe_experiment(client, client.get_experiment(_experiment(client)))
    return client


def start_run(client: "MlflowClient", name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
    """Start a run and return its id; `parent` makes it a child of that run, in the same experiment."""
    from mlflow.exceptions import MlflowException

    experiment = None
    if parent:  # stay with it: somebody may have renamed the experiment since it began
        with suppress(MlflowException):  # of another store
            experiment = str(client.get_run(parent).info.experiment_id)
    experiment = experiment or _experiment(client)
    nesting = {"mlflow.parentRunId": parent} if parent else {}
    run = client.create_run(experiment, tags={**tags, **_process(), **nesting}, run_name=name)
    return str(run.info.run_id)


def _experiment(client: "MlflowClient") -> str:
    """Return the id of our experiment. Raises UserError when it was deleted."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None, "connect() creates it"
    if experiment.lifecycle_stage != "active":
        raise deleted_experiment(str(experiment.experiment_id))
    return str(experiment.experiment_id)


def _process() -> dict[str, str]:
    """Return who writes a run, as tags: by them the next start knows a run whose process is gone."""
    pid = os.getpid()
    return {"process.host": _host(), "process.pid": str(pid), "process.began": began(pid) or ""}


def _host() -> str:
    """Return whose processes can be seen from here: machine, user, and a container's own process numbers."""
    space = ""
    with suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()} {os.getuid()} {space}".strip()


def close_left_over(client: "MlflowClient") -> None:
    """End runs as KILLED whose process on this machine is gone: a closed terminal, SIGKILL, a power cut."""
    mine = f"attributes.status = 'RUNNING' and tags.`process.host` = '{_host()}'"
    for run in client.search_runs([_experiment(client)], mine):
        pid, then = run.data.tags.get("process.pid", ""), run.data.tags.get("process.began")
        if then and pid.isdecimal() and began(int(pid)) != then:
            client.set_terminated(run.info.run_id, "KILLED")


def experiment_of(run_id: str) -> str:
    """Return the id of the experiment that a run belongs to. Raise what MLflow raises."""
    return str(connect().get_run(run_id).info.experiment_id)


class Pipeline:
    """The parent run of a pipeline in `root`, named after what is special about it.

    `name` is for one whose parameters cannot be read. Without a working store: None as its id, one warning.
    """

    def __init__(self, name: str, tags: Mapping[str, str] | None = None, root: Path = Path()) -> None:
        self.run_id: str | None = None
        self._root = root
        self._labels: dict[str, str] = {}
        try:
            self._labels = labels(root)
            self._client = connect()
            close_left_over(self._client)
            params = settings(root)
            described = {"kind": "pipeline", **self._labels, **(tags or {})}
            if params:
                described["recipes"] = " ".join(params.recipes.all)
                changed = flatten(changed_settings(params, root))
                name = run_name(params.profile, params.seed, changed)
                described["changed"] = " ".join(f"{key}={value}" for key, value in changed.items())
            self.run_id = start_run(self._client, name, described)
            if params:
                log_params(self._client, self.run_id, flatten(params.model_dump(mode="json")))
        except Exception as error:
            warn(error)

    def earlier_seconds(self) -> dict[str, float]:
        """Return how long each stage took when it last succeeded with this profile, as far as known."""
        found: dict[str, float] = {}
        with suppress(Exception):  # without a store, say
            experiment = self._client.get_run(self.run_id or "").info.experiment_id
            mine = f"tags.kind = 'stage' and tags.profile = '{self._labels['profile']}'"
            succeeded = f"{mine} and attributes.status = 'FINISHED'"
            newest = ["attributes.start_time DESC"]
            for run in self._client.search_runs([experiment], succeeded, order_by=newest):
                seconds = (run.info.end_time - run.info.start_time) / 1000
                found.setdefault(run.data.tags["stage"], seconds)
        return found

    def close(self, succeeded: bool, stages: Iterable[str] | None = None, ended: bool = False) -> None:
        """End the run and say where its outputs are from, or delete it when no stage was executed.

        `stages` are those that the pipeline brought up to date, executed or not; None: all in dvc.lock.
        `ended`: it has not failed, somebody has ended it.
        """
        if self.run_id is None:
            return
        try:
            experiments = [self._client.get_run(self.run_id).info.experiment_id]
            children = f"tags.`mlflow.parentRunId` = '{self.run_id}'"
            if not self._client.search_runs(experiments, children, max_results=1):
                self._client.delete_run(self.run_id)  # it would say nothing
                return
            # first the state: who ends us may not wait for the rest
            killed = f"{children} and attributes.status = 'KILLED'"
            status = "FINISHED" if succeeded else "FAILED"
            if ended or (not succeeded and self._client.search_runs(experiments, killed, max_results=1)):
                status = "KILLED"  # or a stage was: DVC hides from us that it was Ctrl-C
            self._client.set_terminated(self.run_id, status)
            summarize(self._client, self.run_id, self._root, stages, succeeded)
        except Exception as error:
            warn(error)


class StageRun:
    """The run of one stage. No method raises or waits for the store, except `close`.

    `memory` is a file that keeps the run's id: a stage that was killed and continues goes on in the same
    run, so that its curves have no gap.
    """

    def __init__(self, stage: str, params: Mapping[str, Any], tags: Mapping[str, str], memory: Path) -> None:
        self.run_id: str | None = None
        self._stage, self._tags, self._memory = stage, dict(tags), memory
        self._params = flatten(params)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._metrics: list[tuple[str, float, int, int]] = []  # name, value, step, time in ms
        self._lock = threading.Lock()
        self._warned = False
        self._patience = 0.0
        self._thread: threading.Thread | None = None
        self._monitor: SystemMetricsMonitor | None = None
        try:
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
            # on this thread: imports side by side with torch's may see half of a module
            import mlflow
            import mlflow.system_metrics.system_metrics_monitor  # noqa: F401

            prepare(tracking_uri())  # before the thread starts: a stage may end while it is at work
        except Exception as error:
            self._warn(error)
            return
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Buffer values of one step."""
        now = round(time.time() * 1000)
        with self._lock:
            if len(self._metrics) < MAX_WAITING:
                self._metrics += [(name, float(value), step, now) for name, value in values.items()]

    def submit(self, job: Job, patience: float = 0.0) -> None:
        """Let `job` work with the client and the run's id; a stage that ends waits `patience` s for it."""
        self._patience = max(self._patience, patience)
        self._jobs.put(job)

    def close(self, status: str, timeout: float = CLOSE_TIMEOUT) -> None:
        """Send what is left and end the run as FINISHED, FAILED or KILLED; waits `timeout` s at most."""
        if self._thread is None:
            return
        self._jobs.put(lambda *_: self._monitor and self._monitor.finish())
        self._jobs.put(lambda client, run_id: client.set_terminated(run_id, status))
        self._jobs.put(None)
        timeout = max(timeout, self._patience) if status == "FINISHED" else timeout
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn(TimeoutError(f"no answer for {timeout:.0f} s; the last metrics are lost"))

    def _work(self) -> None:
        def nothing(_client: "MlflowClient", _run_id: str) -> None:
            pass

        client: MlflowClient | None = None
        try:
            client = connect()
            close_left_over(client)
            self.run_id = self._open_run(client)
            self._start_monitor(self.run_id)
        except Exception as error:
            self._warn(error)
        while True:
            try:
                job = self._jobs.get(timeout=FLUSH_INTERVAL)
            except queue.Empty:
                job = nothing
            if client and self.run_id:
                try:
                    self._flush(client, self.run_id)
                    (job or nothing)(client, self.run_id)
                except Exception as error:
                    self._warn(error)
            if job is None:
                return

    def _open_run(self, client: "MlflowClient") -> str:
        parent = os.environ.get(PIPELINE_RUN)
        run_id = self._earlier_run(client)
        if run_id:
            client.update_run(run_id, status="RUNNING")
            nesting = {"mlflow.parentRunId": parent} if parent else {}
            for name, value in {**self._tags, **_process(), **nesting}.items():
                client.set_tag(run_id, name, value)  # the commit may be another one by now
            return run_id
        run_id = start_run(client, self._stage, {"kind": "stage", "stage": self._stage, **self._tags}, parent)
        self._memory.write_text(run_id, encoding="utf-8")
        log_params(client, run_id, self._params)
        return run_id

    def _start_monitor(self, run_id: str) -> None:
        """Start MLflow's own samples of the machine and its GPUs, unless its variable says no."""
        os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
        from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
            logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # we warn, and once
            self._monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=tracking_uri())
            self._monitor.start()

    def _earlier_run(self, client: "MlflowClient") -> str | None:
        from mlflow.exceptions import MlflowException

        if not self._memory.is_file():
            return None
        try:
            run = client.get_run(self._memory.read_text(encoding="utf-8"))
        except MlflowException:  # another store, or one that was cleaned
            return None
        return str(run.info.run_id) if run.info.lifecycle_stage == "active" else None

    def _flush(self, client: "MlflowClient", run_id: str) -> None:
        from mlflow.entities import Metric

        while self._metrics:
            with self._lock:
                waiting = self._metrics[:MAX_METRICS]
            client.log_batch(run_id, [Metric(name, value, when, step) for name, value, step, when in waiting])
            with self._lock:  # only now: what could not be sent is tried again
                del self._metrics[: len(waiting)]

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warn(error)


class Untracked(StageRun):
    """The run of a process whose stage another process tracks."""

    def __init__(self) -> None:
        self.run_id = None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Keep nothing."""

    def submit(self, job: Job, patience: float = 0.0) -> None:
        """Do nothing."""

    def close(self, status: str, timeout: float = CLOSE_TIMEOUT) -> None:
        """Close nothing: nothing is open."""


COPIED = (PLOTS, REPORTS)  # curves and report: for people, and small
MAX_COPY = 10_000_000  # bytes of one file; the report's page stays below 8 MB
MAX_DIGEST = 36  # characters, by MLflow's limit: DVC's digest of a folder fits, our SHA-256 is cut


def log_inputs(client: "MlflowClient", run_id: str, stage: str, hashes: Mapping[str, str]) -> None:
    """Log inputs (path -> content hash) as MLflow data sets, by name and digest; nothing of them is loaded.

    Under DVC the digest is DVC's, as dvc.lock has it of the stage that made the file; otherwise, and for
    files that no stage makes, it is the beginning of ours.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    made = locked_outputs().values() if os.environ.get("DVC_STAGE") else ()
    known = {path: md5 for outputs in made for path, md5 in outputs.items()}
    inputs = []
    for path, digest in hashes.items():
        source = json.dumps({"uri": Path(path).resolve().as_uri()})
        dataset = Dataset(path, known.get(path, digest)[:MAX_DIGEST], "local", source)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", _context(stage, Path(path)))]))
    if inputs:
        client.log_inputs(run_id, inputs)


def _context(stage: str, path: Path) -> str:
    """Say what an input is for: MLflow shows it beside the data set's name."""
    if path.is_relative_to(MODELS):
        return "model"
    return "evaluation" if stage.startswith(("evaluate@", "report")) else "training"


def log_outputs(client: "MlflowClient", run_id: str, pointers: Mapping[str, Mapping[str, Any]]) -> None:
    """Log `outputs.json` with what `describe` says of every output, and the files of COPIED folders."""
    client.log_dict(run_id, dict(pointers), "outputs.json")
    for path in map(Path, pointers):
        if any(path.is_relative_to(folder) for folder in COPIED):
            for file in _files(path):
                if file.stat().st_size <= MAX_COPY:
                    client.log_artifact(run_id, str(file), file.parent.as_posix())


def describe(outputs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return {path: {"sha256", "bytes", "files"}} of each output: enough to know it again anywhere."""
    return {
        path.as_posix(): {
            "sha256": content_hash(path),
            "bytes": sum(file.stat().st_size for file in _files(path)),
            "files": len(_files(path)),
        }
        for path in outputs
    }


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def log_params(client: "MlflowClient", run_id: str, values: Mapping[str, str]) -> None:
    """Log parameters of a run, in requests of a size that MLflow takes."""
    from mlflow.entities import Param

    params = [Param(name, value[:MAX_PARAM_LENGTH]) for name, value in values.items()]
    for start in range(0, len(params), MAX_PARAMS):
        client.log_batch(run_id, params=params[start : start + MAX_PARAMS])


def flatten(values: Mapping[str, Any]) -> dict[str, str]:
    """Join nested keys by dots: {"a": {"b": 1}} -> {"a.b": "1"}; lists and None become JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in flat(values).items()
    }


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Select the finite numbers among `values` (tensors and numpy scalars too), as MLflow takes them."""
    floats = {name: float(value) for name, value in values.items() if isinstance(value, SupportsFloat)}
    return {name: value for name, value in floats.items() if math.isfinite(value)}


def warn(error: Exception) -> None:
    """Say in one line that tracking failed: it is a convenience, and never ends a stage."""
    with suppress(OSError):  # the terminal may be closed by now
        print(f"warning: MLflow does not record this run: {explained(error)}", file=sys.stderr, flush=True)
