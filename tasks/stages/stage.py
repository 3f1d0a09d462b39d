"""What every stage program shares: state that survives a kill, outputs that are complete or absent, records.

    def run() -> None:
        with stage("distill@kd", config={...}, inputs=[...], outputs=[MODEL]) as current:
            save(model, current.output(MODEL))

    if __name__ == "__main__":
        stage_main("distill", run)

From top to bottom: `stage_main` runs the program, `stage` the stage; `_open_state` decides by the fingerprint
whether an unfinished run is continued or begun again; what follows is about several processes that are one
stage, about failures, and about the record of the run.
"""

import argparse
import json
import os
import platform
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, SupportsFloat

from filelock import FileLock, Timeout
from rich.console import Console

from dgpo_core.config.params import read_yaml
from dgpo_core.errors import InfrastructureError, NotFinite, ResourceError, UserError
from dgpo_core.files import remove, write_json, write_text
from tasks.project.files import Outputs, content_hash
from tasks.project.git import head
from tasks.project.process import follows, is_worker, machine, one_line, peak_memory, run_program
from tasks.project.progress import Reporter
from tasks.project.resources import resource_error
from tasks.project.servers import adopt
from tasks.tracking.lineage import Origin, labels, origin, stage_labels
from tasks.tracking.registry import WEIGHTS_PATIENCE, registration
from tasks.tracking.runs import (
    CLOSE_TIMEOUT,
    StageRun,
    Untracked,
    describe,
    flatten,
    log_inputs,
    log_outputs,
    numbers,
)

STATE, RUNS = Path(".state"), Path("runs")
COLLAPSE = "collapse"  # how a note begins that people are told of (flows/alerts.py)
ATTEMPTS = "attempts.json"  # among the stage's runs
# in the stage's state
FINGERPRINT, FAILURE, TRACKING_RUN, OUTPUTS = "fingerprint.json", "failure.json", "mlflow_run", "outputs"
SAME_FAULT = 10.0  # seconds in which one of several processes tells a fault that all of them have
QUICK_CLOSE = 5.0  # seconds: whoever ends us waits about ten before SIGKILL


class Busy(UserError):
    """Another process runs the stage."""


def main(function: Callable[[], None]) -> NoReturn:
    """Run a program that may be a stage of DVC, with the servers of `dgpo up`; see `run_program`.

    Why it failed is left in `.state/<stage>/failure.json`, because `dvc repro` exits 255 whatever happened.
    """
    dvc_stage = os.environ.get("DVC_STAGE")  # set by DVC; errors before `stage()` belong to it too

    def run() -> None:
        if dvc_stage and not is_worker():
            remove(_failure_file(dvc_stage))
        adopt()
        function()

    def failed(error: BaseException) -> None:
        if dvc_stage:
            _record_failure(dvc_stage, error)

    run_program(run, failed)


def stage_main(name: str, function: Callable[..., None], argument: str | None = None) -> NoReturn:
    """Run the program of a stage of dvc.yaml: `function`, with its one `argument` if it has one.

    `--help` says what the stage reads and writes; any other use of the command line ends with 2. See
    `main`.
    """

    def run() -> None:
        parser = argparse.ArgumentParser(
            prog=f"python -m tasks.stages.{name.replace('-', '_')}",
            description=sys.modules["__main__"].__doc__,
            epilog=_graph(name, argument),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if argument:
            parser.add_argument(argument, help=f"which one: the stage is {name}@<{argument}>")
        function(*vars(parser.parse_args()).values())

    main(run)


def _graph(name: str, argument: str | None) -> str:
    """Describe what the stage reads besides the sources and what it writes, as dvc.yaml has it."""
    file = Path("dvc.yaml")
    node = read_yaml(file)["stages"].get(name) if file.is_file() else None
    if node is None:  # of another project
        return ""
    node = node.get("do", node)

    def paths(*keys: str) -> list[str]:
        entries = [entry for key in keys for entry in node.get(key, ())]
        names = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]
        filled = [re.sub(r"\$\{(key|item)\}", f"<{argument}>", text) for text in names]
        return [text.replace("${item.start}", "<its start>") for text in filled]

    parts = {
        "reads": [path for path in paths("deps") if not path.startswith(("tasks/", "dgpo_core/"))],
        "parameters": paths("params"),
        "writes": paths("outs", "metrics", "plots"),
    }
    lines = [
        textwrap.fill(f"{title + ':':12}{', '.join(items)}", 100, subsequent_indent=" " * 12)
        for title, items in parts.items()
        if items
    ]
    return "\n".join(
        [*lines, f"`dvc repro {name}{f'@<{argument}>' if argument else ''}` runs it with what it needs."]
    )


@dataclass
class Run:
    """A stage while it runs. Of several processes the first one `leads`; what the others tell is dropped."""

    stage: str
    state: Path  # kept when the stage continues with the same fingerprint; deleted on success
    reporter: Reporter
    tracker: StageRun
    outputs: Outputs | None = None  # of the process that writes them
    inputs: dict[str, str] = field(default_factory=dict)  # path -> SHA-256
    origin: Origin | None = None
    leads: bool = True  # and writes the outputs
    final: dict[str, float] = field(default_factory=dict)
    models: dict[str, Path] = field(default_factory=dict)  # recipe -> folder, to be registered
    attempts: list[dict[str, Any]] = field(default_factory=list)  # to run the stage, this one last

    def output(self, path: Path) -> Path:
        """Return where to write the output `path`; it is put into its place when the stage has succeeded."""
        assert self.outputs is not None, "only the process that leads writes"
        return self.outputs.place(path)

    def progress(self, done: float, total: float, unit: str = "", **values: str | int | float) -> None:
        """Tell how far it is: `run.progress(step, steps, em=0.21, loss=1.3)`. Cheap; call it every step."""
        self.reporter.update(done, total, unit, **values)

    def note(self, text: str) -> None:
        """Tell something that deserves a line of its own."""
        self.reporter.note(text)

    def metrics(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Send values of one step for MLflow's curves, such as {"train/em": 0.1}; they go in batches."""
        self.tracker.metrics(step, numbers(values))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the numbers among `values` as final metrics of the stage."""
        self.final |= numbers(values)
        self.tracker.metrics(0, numbers(values))

    def register_model(self, recipe: str, folder: Path) -> None:
        """Register the output `folder` as a version of the registered model, once it is there."""
        self.models[recipe] = folder

    def track_inputs(self) -> None:
        """Tell MLflow of the inputs."""
        self.tracker.submit(lambda client, run_id: log_inputs(client, run_id, self.stage, self.inputs))

    def track_outputs(self, outputs: Sequence[Path]) -> None:
        """Tell MLflow of the outputs, which are complete and where they belong, and of the models."""
        pointers = describe(outputs)
        self.tracker.submit(lambda client, run_id: log_outputs(client, run_id, pointers))
        if self.origin:  # read before training began; otherwise somebody has broken params.yaml or dvc.lock
            for recipe, folder in self.models.items():
                job = registration(recipe, self.origin, self.inputs, folder)
                self.tracker.submit(job, WEIGHTS_PATIENCE)


@contextmanager
def stage(
    name: str,
    *,
    config: Mapping[str, Any],
    inputs: Sequence[Path] = (),
    outputs: Sequence[Path] = (),
) -> Iterator[Run]:
    """Run the body as stage `name`: its outputs appear when it succeeds, otherwise `.state/<name>/` stays.

    `config` is JSON-able and resolved: with the content of `inputs` it is the fingerprint that decides
    whether the state of an earlier, unfinished run is continued or wiped. Raises UserError for a missing
    input, and while another process runs the stage. Of several processes only the first one looks at inputs
    and outputs, and writes.
    """
    if follows():
        with _following(name) as run:
            yield run
        return
    started, clock = datetime.now(UTC), time.monotonic()
    products = Outputs(STATE / name / OUTPUTS)
    with ExitStack() as held:
        # 1. Take the stage, fingerprint it, and continue or begin.
        with _failures_recorded(name, products):
            held.enter_context(_alone(name))
            hashes = {path.as_posix(): content_hash(path) for path in inputs}
            state = _open_state(name, {"config": dict(config), "inputs": hashes})
        _wait_for_all()  # the others read the state
        tags = {**stage_labels(name), **labels(), **{f"input.{path}": hash for path, hash in hashes.items()}}
        tracker = StageRun(name, config, tags, state / TRACKING_RUN)
        run = Run(name, state, Reporter(name), tracker, products, hashes, origin())
        run.track_inputs()
        _begin_attempt(run, started)
        status, message = "FINISHED", ""
        try:
            with _failures_recorded(name, products), _named(name):
                # 2. Run the body.
                yield run
                # 3. Put all outputs into their places, or none.
                missing = [str(path) for path in outputs if not (products.has(path) or path.exists())]
                if missing:
                    raise RuntimeError(f"stage {name} ended without writing {', '.join(missing)}")
                products.publish()
                run.track_outputs(outputs)
        except BaseException as error:
            status, message = "FAILED" if isinstance(error, Exception) else "KILLED", one_line(error)
            raise
        finally:
            # 4. Record the run; what a failed one has done stays in the state.
            run.reporter.close()
            tracker.close(status, QUICK_CLOSE if status == "KILLED" else CLOSE_TIMEOUT)
            _write_run(run, status, message, started, time.monotonic() - clock)
            if status == "FINISHED":
                shutil.rmtree(state, ignore_errors=True)


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Keep other processes from running the stage in this folder; raise Busy while one does.

    DVC's stages are alone anyway: this is for those who start programs by hand. The kernel frees the lock of
    a process that is killed.
    """
    path = STATE / f"{name}.lock"
    path.parent.mkdir(exist_ok=True)
    try:
        lock = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise Busy(f"{name}: another process runs this stage here; wait until it ends") from None
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _open_state(name: str, fingerprint: dict[str, Any]) -> Path:
    """Return the stage's state folder, emptied unless it belongs to the same fingerprint."""
    state = STATE / name
    text = json.dumps(fingerprint, indent=2, sort_keys=True)
    kept = state / FINGERPRINT
    if not (kept.is_file() and kept.read_text(encoding="utf-8") == text):
        if kept.is_file():
            print(f"[{name}] begins again: {_difference(kept, fingerprint)}", flush=True)
        remove(state)
        write_text(kept, text)
    remove(state / FAILURE)
    remove(state / OUTPUTS)
    return state


def _difference(kept: Path, fingerprint: Mapping[str, Any]) -> str:
    """Name the settings and inputs that are not those of the unfinished run."""
    try:
        before, now = flatten(json.loads(kept.read_text(encoding="utf-8"))), flatten(fingerprint)
    except ValueError:
        return f"{kept} is not readable"
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return ", ".join(key.removeprefix("config.").removeprefix("inputs.") for key in changed) + " changed"


@contextmanager
def _failures_recorded(name: str, products: Outputs) -> Iterator[None]:
    """When the body fails, remove what it has written and leave why in failure.json.

    An error of the machine is raised in the words of `resource_error`.
    """
    try:
        yield
    except Busy:
        raise  # the state is another process's
    except BaseException as error:
        place = products.latest or STATE / name
        with suppress(OSError):  # first: whoever ends this process may not wait
            products.discard()
        told = resource_error(error, place)
        _record_failure(name, told or error)
        if told:
            raise told from error
        raise


def _record_failure(stage: str, error: BaseException) -> None:
    """Write why the stage failed, as far as that can be written: it is on standard error too."""
    kind: Literal["user", "infrastructure", "bug"] = "bug"
    if isinstance(error, UserError):
        kind = "user"
    elif isinstance(error, InfrastructureError) or not isinstance(error, Exception):
        kind = "infrastructure"  # the latter: somebody stopped it, and trying again is up to them
    retryable = isinstance(error, InfrastructureError) and not isinstance(error, ResourceError)
    path, name = _failure_file(stage), os.environ.get("DVC_STAGE") or stage
    failure = {"stage": name, "kind": kind, "retryable": retryable, "message": one_line(error)}
    with suppress(OSError):
        if path.exists() and (is_worker() or isinstance(error, SystemExit)):
            return  # what failed first is the reason; the other processes fail because of it
        write_json(path, failure)


def _failure_file(stage: str) -> Path:
    """Return where a failure's reason is; DVC's name of the stage counts more than its own."""
    return STATE / (os.environ.get("DVC_STAGE") or stage) / FAILURE


@contextmanager
def _named(stage_name: str) -> Iterator[None]:
    """Say in which stage a number is not finite: whoever computes it does not know."""
    try:
        yield
    except NotFinite as error:
        raise UserError(f"{stage_name}: {error}") from error


@contextmanager
def _following(name: str) -> Iterator[Run]:
    """Run the stage in a process that follows another one: it writes nothing but why it failed."""
    _wait_for_all()
    with Path(os.devnull).open("w") as nowhere:
        try:
            with _named(name):
                yield Run(name, STATE / name, Reporter(name, Console(file=nowhere)), Untracked(), leads=False)
        except Exception as error:
            error = resource_error(error, STATE / name) or error
            if _failed_elsewhere(name):
                # The first process that ends, ends all: let it be the one that says why.
                time.sleep(SAME_FAULT)
                raise SystemExit(2 if isinstance(error, UserError) else 1) from None
            _record_failure(name, error)
            raise error from error.__cause__


def _wait_for_all() -> None:
    """Wait where several processes are the stage; only they have torch by now, which is slow to import."""
    if is_worker():
        from dgpo_core.training import parallel

        parallel.wait()


def _failed_elsewhere(name: str) -> bool:
    """Tell whether another process has failed and said why: mostly all fail alike, or because of one."""
    path, end = _failure_file(name), time.monotonic() + SAME_FAULT
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.1)
    return path.is_file()


def _write_run(run: Run, status: str, message: str, started: datetime, seconds: float) -> None:
    """Record what is true of this execution only, and so of no output: times, machine, ids."""
    record = {
        "stage": run.stage,
        "status": status,
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": machine(),
        "git": head(),
        "mlflow_run": run.tracker.run_id,
        "summary": run.final,
    }
    _write_record(RUNS / run.stage / "run.json", record)
    end = {"FINISHED": "completed", "FAILED": "failed", "KILLED": "stopped"}[status]
    run.attempts[-1] |= {"status": end, "message": message}
    run.attempts[-1] |= {key: record[key] for key in ("ended", "mlflow_run")}
    _write_record(RUNS / run.stage / ATTEMPTS, run.attempts)


def _begin_attempt(run: Run, started: datetime) -> None:
    """Add this execution to the stage's attempts.

    It is unresolved, and stays so where its process or machine dies: nobody has said how it ended. Attempts
    of one fingerprint continue each other.
    """
    path = RUNS / run.stage / ATTEMPTS
    with suppress(OSError, ValueError):  # none so far, or a damaged file
        run.attempts = json.loads(path.read_text(encoding="utf-8"))
    entry = {"attempt": len(run.attempts) + 1, "status": "unresolved", "git": head()}
    entry |= {"started": started.isoformat(timespec="seconds")}
    run.attempts.append(entry | {"fingerprint": content_hash(run.state / FINGERPRINT)[:12]})
    _write_record(path, run.attempts)


def _write_record(path: Path, record: Any) -> None:
    """Write a record of a run. Where that cannot be written, say so: the stage has ended as it has."""
    try:
        write_json(path, record)
    except OSError as error:
        print(f"warning: no record of this run: {error}", file=sys.stderr, flush=True)
