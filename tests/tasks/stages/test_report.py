"""What the report says of the run that it is of."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from dgpo_core.config.params import Params, resolve_profile
from tasks.stages.report import origin_of
from tests.conftest import ROOT


def record(stage: str, **values: object) -> None:
    path = Path("runs") / stage / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"status": "FINISHED", "machine": "4 cores, A", **values}))


def lock(stages: dict[str, tuple[list[str], str]]) -> None:
    """Write a dvc.lock of {stage: (what it reads, what it writes)}."""
    written = {
        name: {
            "cmd": name,
            "deps": [{"path": path, "md5": "0"} for path in deps],
            "outs": [{"path": out, "md5": "0"}],
        }
        for name, (deps, out) in stages.items()
    }
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": written}))


@pytest.fixture
def params(workplace: Path) -> Params:
    (workplace / "profiles").symlink_to(ROOT / "profiles")
    tiny = resolve_profile(workplace / "profiles/tiny.yaml") | {"seed": 3}
    return Params.model_validate(tiny)


def test_a_run_is_told_by_commit_time_machine_and_changes(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGPO_PIPELINE_RUN", "0123456789abcdef")
    Path("code.py").write_text("")
    as_somebody = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "code.py"], [*as_somebody, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    chain: dict[str, tuple[list[str], str]] = {
        "given@student": ([], "models/given"),
        "data": ([], "data"),
        "other": ([], "other"),
    }
    lock(
        chain
        | {f"evaluate@{name}": (["data", "models/given"], f"evaluation/{name}") for name in ("kd", "dgpo")}
    )
    record("data", seconds=90.0)
    record("evaluate@kd", seconds=60.0, machine="2 cores, B")
    record("evaluate@dgpo", seconds=500.0, status="FAILED")
    record("other", seconds=7000.0)
    changed = params.model_copy(update={"compare": ["kd", "dgpo"], "reinforce": params.reinforce.model_copy(
        update={"beta": 0.05}
    )})  # fmt: skip
    origin = origin_of(changed)
    assert origin.facts[:2] == ["tiny", "seed 3"] and origin.facts[2].endswith(" UTC")
    assert origin.facts[3:] == [
        f"commit {commit[:8]}",
        "2.5 min in 2 stages of 3, the others from a cache",
        "4 cores, A; 2 cores, B",
        "changed: reinforce.beta=0.05",
        "MLflow run 01234567",
    ]
    assert origin.changed == {"seed": "3", "reinforce.beta": "0.05"}
    Path("code.py").write_text("changed")
    assert f"commit {commit[:8]}, changed" in origin_of(params).facts


def test_what_is_not_known_is_left_out(params: Params) -> None:
    facts = origin_of(params).facts
    assert not [fact for fact in facts if fact.startswith(("commit", "MLflow")) or " min " in fact]
    assert any(" cores" in fact for fact in facts)
