"""Versions of the registered model: what a training stage leaves, and how people load it again."""

import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.models import save_model
from dgpo_core.world.pretraining import build_tokenizer
from tasks.commands.lineage import show
from tasks.commands.promote import promote
from tasks.project.dvc import dvc_md5
from tasks.project.files import content_hash
from tasks.stages.stage import stage
from tasks.tracking.evaluations import register_trained
from tasks.tracking.registry import CHALLENGER, CHAMPION, Version, model_folder, store
from tasks.tracking.runs import connect
from tests.dgpo_core.making import tiny_model
from tests.tasks.miniature import change_params, run_of
from tests.tasks.trained import make_trained, write_lock

LOAD = """
import sys
import mlflow
pipeline = mlflow.transformers.load_model("models:/search-agent@champion")
print(repr(pipeline("Question: who", max_new_tokens=4, do_sample=False)[0]["generated_text"]))
print(repr(mlflow.pyfunc.load_model("models:/search-agent@champion").predict("Question: who")[0]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("model") / "kd", build_tokenizer()
    save_model(tiny_model(tokenizer), tokenizer, folder)
    return folder


def versions() -> list[Version]:
    with store() as registry:
        return registry.versions()


def train(project: Path, seed: int = 0) -> str:
    """A training stage as tasks/stages/distill.py has it; returns its MLflow run."""
    inputs = [Path("data/index"), Path("metrics/filter.json")]
    with stage("distill@kd", config={"seed": seed}, inputs=inputs, outputs=[Path("models/kd")]) as run:
        (project / "models/kd/touched").touch()
        (project / "models/kd/touched").unlink()
        run.register_model("kd", Path("models/kd"))
    return run_of("distill@kd")


@pytest.fixture
def project(own_store: Path, model: Path) -> Path:
    """Everything is trained and evaluated, kd with a real model; nothing is registered."""
    make_trained(own_store, log_weights=True)
    shutil.rmtree(own_store / "models/kd")
    shutil.copytree(model, own_store / "models/kd")
    write_lock(own_store)
    return own_store


@pytest.mark.thorough
def test_a_trained_model_becomes_a_version_that_anybody_can_load(project: Path) -> None:
    """By its alias, in a fresh process that knows nothing of us."""
    run_id = train(project)
    (version,) = versions()
    assert version.run_id == run_id
    folder = Path("models/kd")
    expected = {
        "recipe": "kd",
        "profile": "tiny",
        "seed": "0",
        "stage": "distill@kd",
        "hash": content_hash(folder),
        "dvc_md5": dvc_md5(folder),
        "weights": "artifact",
        "git": "",
    }
    assert {key: version.tags[key] for key in expected} == expected
    assert promote("1", dry_run=False, yes=True) == 0

    shutil.rmtree(folder)
    found = model_folder("models:/search-agent@champion")
    assert found.resolve() != folder.resolve()
    assert content_hash(found) == version.hash
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD], cwd="/", capture_output=True, text=True, check=False, timeout=300
    )
    assert loaded.returncode == 0, loaded.stderr
    first, second = loaded.stdout.strip().splitlines()
    assert first.startswith("'Question: who") and len(first) > len("'Question: who'")
    assert len(second) > 2


def test_identical_bytes_are_one_version(project: Path) -> None:
    train(project)
    train(project, seed=1)
    assert [version.number for version in versions()] == ["1"]
    (project / "models/kd/extra.txt").write_text("other bytes")
    train(project)
    assert [version.number for version in versions()] == ["1", "2"]


def test_the_lineage_is_of_the_beginning_of_the_training(project: Path) -> None:
    params = Path("params.yaml")
    before = params.read_text()
    with stage("distill@kd", config={}, inputs=[Path("data/index"), Path("metrics/filter.json")]) as run:
        params.write_text(before.replace("epochs: 2", "epochs: 3"))
        run.register_model("kd", Path("models/kd"))
    (version,) = versions()
    with store() as registry:
        stored = registry.lineage_of(version)
    assert stored["params"] == yaml.safe_load(before)
    assert stored["changed"]["distill.epochs"] == [5, 2]
    assert stored["filter"] == {"rule": "correct episodes only", "kept": 30, "of": 40}
    assert stored["index"]["digest"] == "1" * 64
    assert list(stored["stages"]) == ["data", "index", "filter", "distill@kd"]
    assert stored["unlocked"] == []


def pointer(project: Path) -> Version:
    change_params(promote={"log_weights": False})
    train(project)
    (version,) = versions()
    assert version.tags["weights"] == "pointer"
    return version


def test_a_pointer_leads_to_the_working_tree_or_says_what_to_do(project: Path) -> None:
    version = pointer(project)
    assert model_folder("kd") == Path("models/kd")
    assert model_folder("models:/search-agent/1") == Path("models/kd")
    (project / "models/kd/config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"version 1 \(kd\): its weights .*\(md5 {version.tags['dvc_md5']}"):
        model_folder("models:/search-agent/1")


def test_a_pointer_leads_into_dvcs_cache(project: Path, empty_dvc_repository: Path) -> None:
    version = pointer(project)
    shutil.copytree(empty_dvc_repository, project, dirs_exist_ok=True)
    Path(".gitignore").unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "models/kd"], check=True, timeout=120)
    shutil.rmtree("models/kd")
    found = model_folder("models:/search-agent/1")
    assert found != Path("models/kd")
    assert content_hash(found) == version.hash
    (found / "config.json").write_text("tampered")
    assert content_hash(model_folder("models:/search-agent/1")) == version.hash


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models:/search-agent@champion", "no version has this alias; `dgpo promote` makes a champion"),
        ("models:/search-agent@nobody", "no version has this alias"),
        ("models:/search-agent/9", "search-agent has no version 9; there are: none"),
        ("models:/other/1", "expected models:/search-agent@champion"),
        ("dgpo", "or a recipe with a version; there are: none"),
    ],
)
def test_unknown_references(own_store: Path, reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_folder(reference)


def test_a_store_that_fails_is_an_infrastructure_failure(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-scheme://nowhere")
    with pytest.raises(InfrastructureError, match="MLflow's store no-such-scheme://nowhere failed"):
        model_folder("kd")


@pytest.fixture
def registered(own_store: Path) -> Path:
    """Version 1 (kd) and version 2 (dgpo), which challenges."""
    make_trained(own_store)
    register_trained(challenger=True)
    return own_store


def test_a_deleted_run_is_named_with_its_cure(registered: Path) -> None:
    """Others clean up on a server, and do not know which run a version needs."""
    run = versions()[0].run_id
    connect().delete_run(run)
    with pytest.raises(
        UserError, match=rf"the run {run} was deleted in MLflow: .*mlflow runs restore --run-id"
    ):
        register_trained()
    assert show("models:/search-agent/1", as_json=True, params=False, verify=False) == 0


def test_artifacts_that_are_gone_are_named_with_their_cure(registered: Path) -> None:
    version = versions()[1]
    place = connect().get_run(version.run_id).info.artifact_uri
    shutil.rmtree(str(place).removeprefix("file://"))
    with pytest.raises(UserError, match=r"version 2 \(dgpo\): what MLflow kept of it is gone .*lineage.json"):
        show("dgpo", as_json=False, params=False, verify=False)
    shutil.rmtree(registered / "evaluation/dgpo")
    with pytest.raises(UserError, match=r"is gone .*: `dgpo evaluate models:/search-agent/2`"):
        promote(None, dry_run=True, yes=True)


def test_a_deleted_version_or_model_is_registered_again(registered: Path) -> None:
    assert promote("1", dry_run=False, yes=True) == 0
    client = connect()
    client.delete_model_version("search-agent", "2")
    with pytest.raises(UserError, match="no version is the challenger: models/dgpo is not registered"):
        promote(None, dry_run=True, yes=True)
    with pytest.raises(UserError, match="has no version 2; there are: 1"):
        model_folder("models:/search-agent/2")
    register_trained(challenger=True)
    assert [version.number for version in versions()] == ["1", "3"]
    client.delete_registered_model("search-agent")
    with pytest.raises(UserError, match="no version has this alias"):
        model_folder("models:/search-agent@champion")
    register_trained(challenger=True)
    assert [version.number for version in versions()] == ["1", "2"]


def test_an_alias_of_a_version_that_is_gone_is_none(registered: Path) -> None:
    database = registered.parent / "mlflow.db"
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("UPDATE registered_model_aliases SET version = 99")
    with store() as registry:
        assert registry.alias(CHALLENGER) is None and registry.alias(CHAMPION) is None
    with pytest.raises(UserError, match="no version is the challenger"):
        promote(None, dry_run=True, yes=True)


COMMANDS = ("register", "promote", "rollback --reason x", "lineage")


def one_line(command: str) -> tuple[int, str]:
    """Exit code and the only line on standard error of `dgpo <command>`."""
    line = [sys.executable, "-m", "tasks.commands.cli", *command.split()]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    (said,) = done.stderr.splitlines()
    return done.returncode, said


@pytest.mark.thorough
@pytest.mark.parametrize("command", [*COMMANDS, "evaluate dgpo"])
def test_a_deleted_experiment_is_one_line_of_every_command(registered: Path, command: str) -> None:
    connect().delete_experiment("1")
    code, said = one_line(command)
    assert code == 2 and said.startswith("error: the experiment dgpo was deleted in MLflow: ")
    assert said.endswith("mlflow experiments restore -x 1")


@pytest.mark.thorough
@pytest.mark.parametrize("command", [*COMMANDS, "ask x --model models:/search-agent@champion"])
def test_no_server_is_one_line_in_seconds(
    registered: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started = time.monotonic()
    code, said = one_line(command)
    assert code == 1 and "http://127.0.0.1:9 does not answer" in said and "dgpo up" in said
    assert time.monotonic() - started < 60, "also on a busy machine"
