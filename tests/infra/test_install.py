"""How the environment is installed: which torch, what is said before, and what a moved checkout needs."""

import itertools
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from infra import install
from infra.install import Choice, Refusal, announce, brings_cuda, choose, moved, shebang, translate
from tests.conftest import ROOT

INDEX = "https://torch.example/cpu"
CUDA = 'nvidia-cudnn-cu13==9; platform_system == "Linux" or platform_system != "Linux"'


@pytest.mark.parametrize(("gpu", "answering"), itertools.product([True, False], repeat=2))
def test_without_an_index_of_cpu_builds_pip_decides(gpu: bool, answering: bool) -> None:
    assert {choose(wanted, "", gpu, answering) for wanted in ("auto", "cpu", "cuda")} == {Choice()}


def test_the_index_of_cpu_builds_is_for_machines_without_a_gpu_or_whoever_asks() -> None:
    assert choose("auto", INDEX, gpu=False, answers=True) == Choice(INDEX)
    assert choose("cpu", INDEX, gpu=True, answers=True) == Choice(INDEX)
    assert choose("auto", INDEX, gpu=True, answers=True) == Choice()
    assert choose("cuda", INDEX, gpu=False, answers=True) == Choice()


def test_an_index_that_does_not_answer_is_said_or_refused() -> None:
    silent = choose("auto", INDEX, gpu=False, answers=False)
    assert silent.index is None and silent.note == f"TORCH_INDEX={INDEX} does not answer within 5 s; "
    with pytest.raises(Refusal, match="does not answer"):
        choose("cpu", INDEX, gpu=False, answers=False)
    with pytest.raises(Refusal, match="TORCH=gpu: one of auto, cuda, cpu"):
        choose("gpu", "", gpu=False, answers=False)
    assert not install.answers("http://127.0.0.1:9/simple") and not install.answers("no address")


def test_what_is_installed_is_said_before_with_its_size() -> None:
    assert announce("auto", False, False) == "installing torch for the processor, 2.2 GB in all"
    assert announce("auto", True, True) == "installing torch with CUDA, 5.9 GB in all"
    assert announce("cuda", False, True) == "installing torch with CUDA, 5.9 GB in all"
    needless = announce("auto", False, True)
    assert "5.9 GB in all; this machine has no NVIDIA GPU: `make demo TORCH_INDEX=" in needless
    assert "takes 2.2 GB instead" in needless
    with pytest.raises(Refusal, match=r"TORCH=cpu: pip finds torch with CUDA only \(5.9 GB\); add TORCH"):
        announce("cpu", False, True)
    assert announce("cpu", False, None, "so; ") == "so; installing into the environment"


def test_the_build_with_cuda_is_told_by_what_it_needs() -> None:
    pytest.importorskip("pip")
    assert brings_cuda(["filelock", CUDA])
    assert not brings_cuda(["filelock", 'nvidia-cudnn-cu13==9; platform_system == "Nowhere"'])
    assert not brings_cuda([])


def test_only_the_same_python_in_another_place_has_moved() -> None:
    assert moved("/a/.venv python3.11", "/b/.venv python3.11")
    assert moved("", "/b/.venv python3.11"), "stamps were empty once"
    assert not moved("/a/.venv python3.11", "/a/.venv python3.11")
    assert not moved("/a/.venv python3.11", "/b/.venv python3.12"), "it has no packages yet"


@pytest.mark.parametrize("name", ["moved", "moved to a place", "far" + "/away" * 24])
def test_programs_of_a_moved_environment_start_its_python(tmp_path: Path, name: str) -> None:
    old, new = tmp_path / "old" / ".venv", tmp_path / name / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(old)], check=True)
    body = b"import sys; print(sys.prefix)\n"
    kept = {"shell": b"#!/bin/sh\necho bin/python\n", "system": b"#!/usr/bin/python3\n", "data": b"\x00\xff"}
    programs = {
        "tool": f"#!{old}/bin/python3.11\n".encode() + body,
        "odd": shebang(f"{old} x/bin/python") + body,
    }
    for program, text in {**programs, **kept}.items():
        (old / "bin" / program).write_bytes(text)
        (old / "bin" / program).chmod(0o755)
    new.parent.mkdir(parents=True)
    old.rename(new)
    code = f"from pathlib import Path; from infra.install import redirect; redirect(Path({str(new)!r}))"
    subprocess.run([new / "bin/python", "-c", code], check=True, cwd=ROOT)
    for program in programs:
        assert subprocess.check_output([new / "bin" / program], text=True).strip() == str(new)
    for program, text in kept.items():
        assert (new / "bin" / program).read_bytes() == text
    activated = f". {shlex.quote(str(new / 'bin/activate'))}; command -v python"
    assert subprocess.check_output(["sh", "-c", activated], text=True).strip() == f"{new}/bin/python"


def test_pips_settings_are_uvs_and_what_has_no_counterpart_is_left_to_pip() -> None:
    settings = r"""
        global.index-url='https://a/simple'
        global.extra-index-url='\nhttps://b/simple\nhttps://c/simple'
        global.timeout='60'
        install.index-url='https://d/simple'
        freeze.index-url='https://no/simple'
        :env:.find-links='/wheels'
        :env:.no-index='0'
        :env:.timeout='90'
        :env:.disable-pip-version-check='1'
    """
    lines = "\n".join(line.strip() for line in settings.splitlines())
    options = (
        "--index-url https://d/simple --extra-index-url https://b/simple --extra-index-url https://c/simple"
    )
    expected = ([*options.split(), "--find-links", "/wheels"], {"UV_HTTP_TIMEOUT": "90"})
    assert translate(lines) == expected
    assert translate(f"{lines}\nglobal.only-binary=':all:'") is None


@pytest.mark.thorough
def test_uv_finds_what_only_pips_settings_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for version in ("1", "2", "3"):
        info = f"toy-{version}.dist-info"
        with zipfile.ZipFile(wheels / f"toy-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("toy.py", f"version = {version}\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    (tmp_path / "most.txt").write_text("toy<3\n")
    settings = f"[global]\nfind-links = {wheels}\nconstraint = {tmp_path / 'most.txt'}\n"
    (tmp_path / "pip.conf").write_text(settings)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    log = tmp_path / "log"
    assert install.uv(log, ["--target", str(site), "toy"], os.environ), log.read_text()
    assert (site / "toy.py").read_text() == "version = 2\n"
    assert not install.uv(log, ["--target", str(site), "toy==4"], os.environ)
    monkeypatch.setenv("PIP_PREFER_BINARY", "1")
    assert not install.uv(log, ["--target", str(site), "toy"], os.environ)


def test_a_failing_pip_is_shown_and_leaves_no_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no project to install
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("TORCH", "cuda")
    broken = [sys.executable, "-c", "print('no room'); raise SystemExit(3)"]
    monkeypatch.setattr(install, "_pip", lambda: broken)
    assert install.main("/somewhere python3") == 1
    said, log = capsys.readouterr(), tmp_path / "install.log"
    assert f"(some minutes; log: {log})" in said.out and "no room" not in said.out
    # it cannot install uv either
    assert said.err == f"no room\nno room\nerror: pip ended with exit code 3; all that it said: {log}\n"
    assert not (tmp_path / ".installed").exists()


def test_what_make_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("TORCH", "rocm")
    assert install.main("/somewhere python3") == 2
    assert capsys.readouterr().err == "error: TORCH=rocm: one of auto, cuda, cpu\n"


def make(folder: Path) -> str:
    """Ask make what it would do for `.venv/.installed` there."""
    command = ["make", "-n", "-f", str(ROOT / "Makefile"), ".venv/.installed"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_make_sees_that_the_environment_belongs_to_another_place(tmp_path: Path) -> None:
    (tmp_path / "constraints").mkdir()
    for name in ("pyproject.toml", "constraints/main.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(Path(sys.executable).resolve())
    stamp, python = tmp_path / ".venv/.installed", Path(sys.executable).resolve().name
    stamp.write_text(f"{tmp_path}/.venv {python}\n")
    assert "infra.install" not in make(tmp_path)
    for other in ("", f"{tmp_path}/old/.venv {python}\n", f"{tmp_path}/.venv python2\n"):
        stamp.write_text(other)
        assert f'-m infra.install "{tmp_path}/.venv {python}"' in make(tmp_path)
