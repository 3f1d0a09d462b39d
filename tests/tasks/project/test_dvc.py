"""DVC's files against DVC itself, and what DVC needs, each missing in a real DVC repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import dvc  # noqa: F401 - sets up its loggers, to a stream that outlives a test's
import pytest

from dgpo_core.config.yaml_text import as_text
from dgpo_core.errors import UserError
from tasks.commands.doctor import repository
from tasks.commands.pipeline import main
from tasks.project.dvc import dvc_md5, from_cache, maker, problems, read_lock, require_dvc, upstream
from tests.tasks.commands.test_doctor import profile

PIPELINE = """
stages:
  first:
    cmd: mkdir -p out/deep && echo 1 > out/b && echo 2 > out/a-b && echo 3 > out/deep/a && echo 4 > out/Z
    deps: [source]
    outs: [out]
  second:
    cmd: cp out/b copy
    deps: [out]
    outs: [copy]
  apart:
    cmd: echo x > apart
    outs: [apart]
"""


@pytest.fixture
def finished(dvc_repository: Path) -> Path:
    (dvc_repository / "source/__pycache__").mkdir(parents=True)
    (dvc_repository / "source/module.py").write_text("1")
    (dvc_repository / "source/__pycache__/module.pyc").write_text("2")
    (dvc_repository / ".dvcignore").write_text("__pycache__/\n")
    (dvc_repository / "dvc.yaml").write_text(PIPELINE)
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True, timeout=120)
    return dvc_repository


def test_the_lock_is_read_and_its_hashes_are_ours(finished: Path) -> None:
    lock = read_lock()
    assert set(lock) == {"first", "second", "apart"}
    for stage in lock.values():
        for path, md5 in {**stage.deps, **stage.outs}.items():
            assert dvc_md5(Path(path)) == md5, path
    assert dvc_md5(Path("nowhere")) is None
    assert maker(lock, "copy") == "second"
    assert list(upstream(lock, ["copy"])) == ["first", "second"]

    restored, out = Path("restored"), lock["first"].outs["out"]
    assert from_cache(out, restored)
    assert dvc_md5(restored) == out
    assert not from_cache("0" * 32 + ".dir", Path("other"))
    kept = finished / ".dvc/cache/files/md5"
    md5 = dvc_md5(Path("out/b")) or ""
    (kept / md5[:2] / md5[2:]).unlink()
    assert not from_cache(out, Path("other")), "a part is missing"
    assert not Path("other").exists()


def test_parameters_are_read_as_dvc_has_written_them(dvc_repository: Path) -> None:
    """In YAML 1.2: a rate without a point is a number, a recipe may be called `on`."""
    params = {"rates": {"actor": 1e-6, "critic": 1e-05, "steps": 5e22}, "on": {"start": "no", "time": "1:30"}}
    params |= {"seed": 2**53, "revision": "1e5", "folder": "08"}
    Path("params.yaml").write_text(as_text(params))
    stage = {"cmd": "echo 1 > out", "params": list(params), "outs": ["out"]}
    Path("dvc.yaml").write_text(as_text({"stages": {"only": stage}}))
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True, timeout=120)
    lock = read_lock()["only"]
    assert lock.params == params
    assert lock.param("rates.actor") == 1e-6
    assert lock.param("on.start") == "no"


def test_a_broken_lock_is_the_users_to_mend(tmp_path: Path) -> None:
    assert read_lock(tmp_path) == {}
    (tmp_path / "dvc.lock").write_text("stages: [")
    with pytest.raises(UserError, match=r"dvc\.lock: not a lock file of DVC"):
        read_lock(tmp_path)


RECORD = Path(".dvc/tmp/rwlock")


@pytest.fixture
def checkout(dvc_repository: Path) -> Path:
    Path("dvc.yaml").write_text("stages:\n  one: {cmd: echo 1 > one.txt, outs: [one.txt]}\n")
    Path("taken").write_text("a file where a folder is wanted")
    return dvc_repository


def local(text: str) -> None:
    Path(".dvc/config.local").write_text(text)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a pipeline that does not start, which is also what `dgpo doctor` finds."""
    assert main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    (found,) = [f for f in repository(profile("tiny")) if f.level == "error" and f.subject == "DVC"]
    assert line == f"error: {found.message}; {found.advice}"
    assert not Path("one.txt").exists()
    return line


@pytest.mark.parametrize("key", ["core.site_cache_dir", "cache.dir"])
def test_a_folder_that_cannot_be_written(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.delenv("DVC_SITE_CACHE_DIR", raising=False)
    section, name = key.split(".")
    local(f"[{section}]\n    {name} = {checkout}/taken/x\n")
    line = said(capsys)
    assert f"DVC cannot use {checkout}/taken/x" in line and f"({key}): Not a directory" in line
    assert line.endswith(f"set another folder: dvc config --local {key} FOLDER")


def test_a_temporary_folder_that_is_none(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted(Path(".dvc/tmp").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    Path(".dvc/tmp").rmdir()
    Path(".dvc/tmp").write_text("")
    assert ".dvc/tmp (its temporary folder): File exists" in said(capsys)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("broken [[[", "Invalid line"),
        ("[core]\n    nosuch = 1\n", "extra keys not allowed"),
        ("\xff", "decode"),
    ],
)
def test_settings_that_cannot_be_read(
    checkout: Path, capsys: pytest.CaptureFixture[str], text: str, why: str
) -> None:
    Path(".dvc/config.local").write_bytes(text.encode("latin-1"))
    line = said(capsys)
    assert line.startswith("error: DVC cannot read .dvc/config.local: ") and why in line


def test_a_user_without_a_name(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container has that runs as an arbitrary number."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert "user 54321 has none; set USER=" in said(capsys)


def test_another_folder_than_a_checkout(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "is no checkout (it has no .dvc); run it in the checkout's root" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["", '{"write": {"/pr', "[]", '{"write": {"a": 1}}'])
def test_a_record_that_a_killed_dvc_left_half_written_is_removed(checkout: Path, left: str) -> None:
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(left)
    (problem,) = problems()
    assert problem.message.startswith(".dvc/tmp/rwlock: left half written") and problem.advice == "delete it"
    require_dvc()
    assert not RECORD.exists() and not problems()


def test_a_remote_that_is_not_defined(checkout: Path) -> None:
    local("[core]\n    remote = nosuch\n")
    (found,) = [f for f in repository(profile("tiny")) if f.subject == "DVC"]
    assert found.level == "error" and "names 'nosuch'" in found.message
    require_dvc()  # a run needs none


def pipeline() -> tuple[int, str]:
    """Exit code and stderr of `python -m tasks.commands.pipeline`."""
    done = subprocess.run(
        [sys.executable, "-m", "tasks.commands.pipeline"], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.thorough
def test_another_run_at_work_here_is_named(checkout: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        RECORD.parent.mkdir(exist_ok=True)
        entry = {"pid": other.pid, "cmd": "dvc repro"}
        RECORD.write_text(json.dumps({"write": {f"{checkout}/one.txt": entry}, "read": {}}))
        code, said = pipeline()
        assert code == 2
        last = said.splitlines()[-1]
        assert last.startswith("error: another run is at work here")
        assert f"(process {other.pid}): wait" in last
        other.kill()
    assert pipeline()[0] == 0 and Path("one.txt").read_text() == "1\n"


@pytest.mark.thorough
def test_any_other_failure_is_dvcs_own(checkout: Path) -> None:
    Path("dvc.yaml").write_text("stages:\n  one: {cmd: 'false', outs: [one.txt]}\n")
    code, said = pipeline()
    assert code == 255 and "another run" not in said
    with pytest.raises(UserError, match="is no checkout"):
        require_dvc(Path("nowhere"))
