"""The graph as DVC has it."""

import subprocess
import sys
from pathlib import Path

import pytest

from dgpo_core.errors import UserError
from tasks.commands.use import use
from tasks.project.graph import Stage, downstream, read_dag, select
from tests.conftest import ROOT

PIPELINE = """
stages:
  report: {cmd: "true", deps: [kd/model, index.json], outs: [report.html]}
  distill:
    matrix: {seed: [1, 2]}
    cmd: "true"
    deps: [questions.jsonl, index.json]
    outs: ["kd-${item.seed}"]
  kd:
    cmd: "true"
    deps: [index.json]
    outs: [kd]
    meta: {timeout_minutes: 1.5, retries: 0, pool: gpu, gpus: 2}
  index: {cmd: "true", outs: [index.json]}
"""


@pytest.fixture
def repository(dvc_repository: Path) -> Path:
    Path("questions.jsonl").write_text("{}")
    Path("questions.jsonl.dvc").write_text("outs:\n- path: questions.jsonl\n")  # data, not a stage
    Path("dvc.yaml").write_text(PIPELINE)
    return dvc_repository


def test_stages_come_after_what_they_need(repository: Path) -> None:
    stages = read_dag(repository)
    assert set(stages) == {"index", "kd", "report", "distill@1", "distill@2"}
    kd = Stage(name="kd", upstream=("index",), timeout_minutes=1.5, retries=0, pool="gpu", gpus=2)
    assert stages["kd"] == kd
    assert stages["report"].upstream == ("index", "kd")
    names = list(stages)
    assert all(names.index(need) < names.index(name) for name in names for need in stages[name].upstream)


def test_only_what_has_changed_is_changed(repository: Path) -> None:
    Path("dvc.yaml").write_text(
        "stages:\n  a: {cmd: touch a, outs: [a]}\n  b: {cmd: touch b, deps: [a], outs: [b]}\n"
    )
    assert {name: stage.changed for name, stage in read_dag(repository).items()} == {"a": True, "b": True}
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    assert not any(stage.changed for stage in read_dag(repository).values())
    Path("b").unlink()
    assert {name: stage.changed for name, stage in read_dag(repository).items()} == {"a": False, "b": True}


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_the_base_models_in_git_are_those_of_the_sources(model: str) -> None:
    """A change of what they depend on would have everybody's first `make demo` build them for an hour."""
    assert not read_dag(ROOT)[f"base-model@{model}"].changed


@pytest.mark.parametrize("profile", ["paper-qwen-3b", "paper-qwen-7b", "paper-llama-8b"])
def test_the_papers_pipeline_builds_no_model_of_the_embedded_world(
    profile: str, dvc_repository: Path
) -> None:
    """It would take hours and delete the built models first, since the paper's protocol is another."""
    for name in ("dvc.yaml", "dvc.lock", "profiles", "dgpo_core", "tasks", "models"):
        Path(name).symlink_to(ROOT / name)
    use("tiny", [])
    assert "base-model@student" in read_dag(dvc_repository)
    use(profile, [])
    stages = read_dag(dvc_repository)
    assert not [name for name in stages if name.startswith("base-model")]
    assert {"data", "reinforce@dgpo", "report"} < set(stages)


@pytest.mark.parametrize("left", ["", '{"write": {"/pr'])
def test_a_lock_that_a_killed_dvc_left_half_written_stops_nobody(repository: Path, left: str) -> None:
    Path(".dvc/tmp/rwlock").write_text(left)
    broken = subprocess.run([sys.executable, "-m", "dvc", "status"], capture_output=True, text=True)
    assert "corrupted" in broken.stderr  # what DVC itself makes of it
    assert set(read_dag(repository)) == {"index", "kd", "report", "distill@1", "distill@2"}


def test_targets_bring_what_they_need_and_from_stage_what_needs_it(repository: Path) -> None:
    stages = read_dag(repository)
    assert list(select(stages, ["kd"])) == ["index", "kd"]
    assert set(select(stages, from_stage="kd")) == {"kd", "report"}
    assert list(select(stages, ["report"], "kd")) == ["kd", "report"]
    assert downstream(stages, "index") == set(stages)
    assert set(select(stages, ["distill"])) == {"index", "distill@1", "distill@2"}
    assert set(select(stages, from_stage="distill")) == {"distill@1", "distill@2"}
    assert select(stages) == stages
    with pytest.raises(UserError, match="none of index depends on kd"):
        select(stages, ["index"], "kd")


@pytest.mark.parametrize("arguments", [(["evaluate"], None), ([], "evaluate")])
def test_unknown_names(repository: Path, arguments: tuple[list[str], str | None]) -> None:
    with pytest.raises(UserError, match=r"no such stage: evaluate; there are .*index"):
        select(read_dag(repository), *arguments)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("{timeout_minutes: soon}", r"timeout_minutes: .*valid number \(found 'soon'\)"),
        ("{timeout_minutes: -1}", "timeout_minutes: .*greater than 0"),
        ("{retries: -1}", "retries: .*greater than or equal to 0"),
        ("{retries: 1.5}", "retries: .*valid integer"),
        ("{retries: true}", "retries: .*valid integer"),
        ("{gpus: -1}", "gpus: .*greater than or equal to 0"),
        ("{pool: big}", r"pool: .*'cpu' or 'gpu' \(found 'big'\)"),
        ("{retrys: 1}", r"stages\.a\.meta\.retrys: .*not permitted.*known: timeout_minutes, retries"),
        ("[1]", "stages.a.meta: .*dictionary"),
    ],
)
def test_bad_meta(repository: Path, meta: str, message: str) -> None:
    Path("dvc.yaml").write_text(f"stages:\n  a: {{cmd: 'true', meta: {meta}}}\n")
    with pytest.raises(UserError, match=message):
        read_dag(repository)


@pytest.mark.parametrize("text", ["", "stages: {}", "stages:\n  a: {cmnd: x}", "stages: [", "a: 1"])
def test_bad_pipelines(repository: Path, text: str) -> None:
    Path("dvc.yaml").write_text(text)
    with pytest.raises(UserError):
        read_dag(repository)


def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no checkout"):
        read_dag(tmp_path)


def test_cycle(repository: Path) -> None:
    Path("dvc.yaml").write_text(
        "stages:\n  a: {cmd: x, deps: [b], outs: [a]}\n  b: {cmd: x, deps: [a], outs: [b]}\n"
    )
    with pytest.raises(UserError, match="cycl"):
        read_dag(repository)
