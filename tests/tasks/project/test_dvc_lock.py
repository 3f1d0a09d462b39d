"""DVC's files, against DVC itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from dgpo_core.config.yaml_text import as_text
from dgpo_core.errors import UserError
from tasks.project.dvc import dvc_md5, from_cache, maker, read_lock, upstream

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
