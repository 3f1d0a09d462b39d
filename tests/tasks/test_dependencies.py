"""What the stages run and read is what dvc.yaml says they depend on; a change elsewhere would go unseen."""

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import yaml

from tasks.stages.audit import audit
from tasks.stages.base_model import build
from tasks.stages.data import generate
from tasks.stages.distill import distill
from tasks.stages.distributions import distributions
from tasks.stages.evaluate import evaluate
from tasks.stages.filter import filter_episodes
from tasks.stages.index import index
from tasks.stages.reinforce import reinforce
from tasks.stages.report import report
from tasks.stages.teach import teach
from tests.conftest import ROOT, make_workplace
from tests.tasks.miniature import HEALED, make_project

pytestmark = pytest.mark.thorough

# What runs in stages and cannot change a result, so that no stage depends on it:
WITHOUT_EFFECT = (
    "dgpo_core/config",  # reads params.yaml, which has every value; DVC watches those
    "dgpo_core/errors.py",
    "dgpo_core/files.py",  # how a file is put into its place
    "dgpo_core/hub.py",  # whether a model is in the hub's cache
    "dgpo_core/reporting/episodes.py",  # in traces; the report, which shows it, watches it
    "dgpo_core/agent/vllm_engine.py",
    "dgpo_core/tables.py",  # how a file is read
    "dgpo_core/temporary.py",  # folders of which nothing stays
    "dgpo_core/threads.py",  # how many compute: each batch gives the same in any thread
    "dgpo_core/training/state_files.py",
    "dgpo_core/training/checkpoint.py",  # what continues ends as if it had not been interrupted
    "dgpo_core/training/parallel.py",  # one process here; in several, results differ by rounding
    "tasks/project",  # this and what follows: where, how and with which record a stage runs
    "tasks/tracking",
    "tasks/stages/base_model.py",
    "tasks/stages/inputs.py",
    "tasks/stages/stage.py",
)
# Read by every stage (params.yaml) or for its record (dvc.lock, git), and what a stage makes for itself.
NO_INPUTS = ("params.yaml", "dvc.lock", ".state", "runs", "profiles", "mlruns", ".git")
BASE = {
    "world": {"passages": 150},
    "worlds": 1,
    "expert_episodes": 12,
    "models": {
        "small": {
            "shape": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16},
            "phases": [
                {"kind": kind, "steps": 2, "batch_size": 2, "warmup_steps": 1}
                for kind in ("reading", "protocol")
            ],
        }
    },
}
STAGES: dict[str, Callable[[], None]] = {
    "base-model@small": partial(build, "small"),
    "data": generate,
    "index": index,
    "audit": audit,
    "teach": teach,
    "filter": filter_episodes,
    "distributions": distributions,
    "distill@kd": partial(distill, "kd"),
    "distill@gkd": partial(distill, "gkd"),
    "distill@healed": partial(distill, "healed"),
    "reinforce@dgpo": partial(reinforce, "dgpo"),
    "evaluate@teacher": partial(evaluate, "teacher"),
    "evaluate@dgpo": partial(evaluate, "dgpo"),
    "report": report,
}


def is_ours(file: Path, root: Path) -> bool:
    """Whether a file is in `root` and none of the environment, which may lie in it."""
    installed = file.is_relative_to(sys.prefix) or file.parent.suffix == ".egg-info"
    return file.is_relative_to(root) and not installed


class Trace:
    """Files of this tree whose functions were called, and files that were opened for reading."""

    def __init__(self) -> None:
        self.active = False
        self.called: set[CodeType] = set()
        self.read: set[Path] = set()
        sys.addaudithook(self._audit)  # for good: Python has no way to take one back

    @contextmanager
    def on(self) -> Iterator[None]:
        self.called.clear()
        self.read.clear()
        self.active = True
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
            self.active = False

    def sources(self) -> set[str]:
        """Without modules' and classes' bodies, which run when they are imported, used or not."""
        files = {Path(code.co_filename) for code in set(self.called) if code.co_flags & CO_OPTIMIZED}
        return {file.relative_to(ROOT).as_posix() for file in files if is_ours(file, ROOT)}

    def _profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call":
            self.called.add(frame.f_code)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event == "open" and isinstance(arguments[0], str) and arguments[1] in ("r", "rb"):
            self.read.add(Path(arguments[0]))


def declared(name: str) -> tuple[list[str], list[str]]:
    """Dependencies and outputs of a stage in dvc.yaml."""
    kind, _, item = name.partition("@")
    entry = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][kind]
    entry = entry.get("do", entry)
    start = {"kd": "student", "gkd": "student", "healed": "student", "dgpo": "kd"}.get(item, "")
    outs = [
        next(iter(out)) if isinstance(out, dict) else out
        for group in ("outs", "metrics", "plots")
        for out in entry.get(group, [])
    ]
    values = {"${key}": item, "${item}": item, "${item.start}": start}
    for variable, value in values.items():
        entry["deps"] = [dep.replace(variable, value) for dep in entry["deps"]]
        outs = [out.replace(variable, value) for out in outs]
    return entry["deps"], outs


@contextmanager
def linked(outputs: list[str], cache: Path) -> Iterator[None]:
    """Outputs of an earlier run, linked into a cache that must stay as it is."""
    for number, output in enumerate(outputs):
        kept, path = cache / str(number), Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text("earlier")
            path.hardlink_to(kept)
        else:
            kept.mkdir(parents=True)
            path.symlink_to(kept.resolve())
    yield
    for number, output in enumerate(outputs):
        kept = cache / str(number)
        assert kept.read_text() == "earlier" if kept.is_file() else not list(kept.iterdir()), output
        assert Path(output).exists() and not Path(output).is_symlink()


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory, mlflow_store: str
) -> dict[str, tuple[set[str], set[str]]]:
    """Of each stage: this tree's files whose functions it called, and the files that it read."""
    folder, trace, found = tmp_path_factory.mktemp("traced"), Trace(), {}
    with pytest.MonkeyPatch.context() as patch:
        make_workplace(folder, patch, mlflow_store)
        make_project(folder, ["gkd", "dgpo"], base_models=BASE)
        (folder / "models/given").mkdir()
        for name in ("student", "teacher"):
            shutil.copytree(ROOT / "models" / name, folder / "models/own" / name)
            (folder / "models" / name).unlink()
            (folder / "models/given" / name).symlink_to(f"../own/{name}")
        params = yaml.safe_load(Path("params.yaml").read_text())
        params["compare"] = ["teacher", "dgpo"]
        params["recipes"]["distill"]["healed"] = HEALED
        params["models"] = {name: f"models/given/{name}" for name in ("student", "teacher")}
        Path("params.yaml").write_text(yaml.safe_dump(params))
        for name, program in STAGES.items():
            with linked(declared(name)[1], folder / "cache" / name), trace.on():
                program()
            read = {path if path.is_absolute() else folder / path for path in trace.read}
            places = {
                file.relative_to(root).as_posix()
                for file in filter(Path.exists, read)
                for root in (folder, ROOT)
                if is_ours(file, root)
            }
            found[name] = (trace.sources(), places)
    return found


def uncovered(files: set[str], places: tuple[str, ...]) -> list[str]:
    return sorted(file for file in files if not any(Path(file).is_relative_to(place) for place in places))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_only_code_that_dvc_watches(
    traced: dict[str, tuple[set[str], set[str]]], name: str
) -> None:
    called, _ = traced[name]
    assert not uncovered(called, (*declared(name)[0], *WITHOUT_EFFECT, "tests"))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_reads_only_files_that_dvc_watches(
    traced: dict[str, tuple[set[str], set[str]]], name: str
) -> None:
    _, read = traced[name]
    dependencies, outputs = declared(name)  # outputs are hashed for the record when they are complete
    data = {file for file in read if not file.endswith((".py", ".pyc"))}
    assert not uncovered(data, (*dependencies, *outputs, *WITHOUT_EFFECT, *NO_INPUTS))


@pytest.mark.parametrize("name", STAGES)
def test_dvc_watches_nothing_that_is_not_there(name: str) -> None:
    sources = [dep for dep in declared(name)[0] if dep.startswith(("dgpo_core/", "tasks/"))]
    assert sources
    assert all((ROOT / source).exists() for source in sources)
