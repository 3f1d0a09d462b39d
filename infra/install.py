"""Install what the environment needs: `python -m infra.install PLACE [EXTRA]`, as make calls it.

Only the standard library is used. uv installs, in a tenth of pip's time, with pip's settings; pip does where
there is no uv, or uv cannot do it. Both write into a log, which is shown when pip fails. The program says
beforehand which build of torch is taken and how large it is: from the package index everybody on Linux gets
the one with CUDA. Without an NVIDIA GPU torch's own index of CPU builds is used where TORCH_INDEX names it
and it answers.

The stamp holds the environment's place and Python, and so tells a checkout that was moved or copied: programs
and the link to the sources are then directed to the new place, and nothing is installed again.
"""

import ast
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONSTRAINTS = "constraints/main.txt"
SOURCES = ("pyproject.toml", CONSTRAINTS)
TORCH = ("auto", "cuda", "cpu")
ANSWER = 5.0  # seconds in which the index of CPU builds must answer
SIZES = {False: "2.2 GB", True: "5.9 GB"}  # of the whole environment, with and without CUDA
TAIL = 30  # lines of the log that are shown
# pip's settings that uv takes as options, once for each of their values
OPTIONS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
}
VARIABLES = {"cert": "SSL_CERT_FILE", "timeout": "UV_HTTP_TIMEOUT", "default-timeout": "UV_HTTP_TIMEOUT"}
# what says nothing of where packages come from
HARMLESS = (
    "cache-dir config-file disable-pip-version-check no-color no-input no-warn-script-location progress-bar "
    "quiet require-virtualenv retries root-user-action verbose"
).split()
# What the programs import: compiled at once, by two processes, for uv leaves it to who comes first.
PROGRAMS = (
    "dvc.cli, dvc.repo.reproduce, dvc.repo.index, tasks.commands.pipeline, tasks.stages.report, "
    "mlflow.genai, mlflow.store.tracking.sqlalchemy_store",
    "tasks.stages.reinforce, tasks.stages.evaluate, transformers.models.qwen2.modeling_qwen2",
)
LONGEST = 120  # bytes of a path behind #! that every system reads
# How a program of an environment begins; one of the system (/usr/bin/python) is not an environment's.
HEAD = re.compile(
    rb"#!(?!/usr/)/[^\n]*/bin/python[\d.]*\n|#!/bin/sh\n'''exec' [^\n]*/bin/python[\d.]*[^\n]*\n' '''\n"
)


class Refusal(Exception):
    """The user asked for something that cannot be had; the text says what to do."""


@dataclass(frozen=True)
class Choice:
    """The index of CPU builds that pip is to look at besides, if any, and why none where one was named."""

    index: str | None = None
    note: str = ""


def choose(wanted: str, index: str, gpu: bool, answers: bool) -> Choice:
    """Return where torch comes from.

    `wanted`: TORCH, of `auto`, `cuda` and `cpu`. `index`: TORCH_INDEX, or empty; `answers`: whether it does.
    Raise Refusal for another `wanted`, and for `cpu` from an index that does not answer.
    """
    if wanted not in TORCH:
        raise Refusal(f"TORCH={wanted}: one of {', '.join(TORCH)}")
    if not index or wanted == "cuda" or (wanted == "auto" and gpu):
        return Choice()
    if answers:
        return Choice(index)
    silent = f"TORCH_INDEX={index} does not answer within {ANSWER:.0f} s"
    if wanted == "cpu":
        raise Refusal(silent)
    return Choice(note=f"{silent}; ")


def announce(wanted: str, gpu: bool, cuda: bool | None, note: str = "") -> str:
    """Return what is said before the installation. `cuda`: of the build that pip takes; None: unknown.

    Raise Refusal for TORCH=cpu where pip knows no CPU build.
    """
    if cuda is None:
        return f"{note}installing into the environment"
    size = SIZES[cuda]
    hint = "TORCH_INDEX=<address of torch's CPU builds, as its installation page has it>"
    if cuda and wanted == "cpu":
        raise Refusal(f"TORCH=cpu: pip finds torch with CUDA only ({size}); add {hint}")
    what = f"{note}installing torch {'with CUDA' if cuda else 'for the processor'}, {size} in all"
    if cuda and not gpu and wanted == "auto":
        return f"{what}; this machine has no NVIDIA GPU: `make demo {hint}` takes {SIZES[False]} instead"
    return what


def has_gpu() -> bool:
    """Return whether NVIDIA's driver is here."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    try:
        return bool(subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=10, check=True).stdout)
    except (OSError, subprocess.SubprocessError):
        return False


def answers(index: str) -> bool:
    """Return whether a package index has torch and says so in time."""
    try:
        with urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=ANSWER):
            return True
    except (OSError, ValueError, urllib.error.URLError):
        return False


def takes_cuda(source: Sequence[str]) -> bool | None:
    """Return whether the torch that pip would install needs CUDA's libraries; None where it installs none."""
    command = ["install", "--quiet", "--dry-run", "--no-deps", "--report", "-", *source, "torch"]
    done = subprocess.run([*_pip(), *command], capture_output=True, text=True, check=False)
    try:
        items: list[dict[str, Any]] = json.loads(done.stdout)["install"]
        needs = items[0]["metadata"].get("requires_dist", [])
    except (ValueError, LookupError, TypeError):
        return None  # already there, or out of reach: pip itself will say so
    return brings_cuda(needs)


def brings_cuda(needs: Sequence[str]) -> bool:
    """Return whether one of these requirements is NVIDIA's and holds on this machine."""
    from pip._vendor.packaging.requirements import Requirement

    requirements = (Requirement(need) for need in needs if need.startswith(("nvidia", "cuda")))
    return any(r.marker is None or r.marker.evaluate({"extra": ""}) for r in requirements)


def moved(before: str, now: str) -> bool:
    """Return whether an environment of the same Python was elsewhere; `before` is empty in old stamps."""
    return before != now and (not before or before.split(" ")[-1] == now.split(" ")[-1])


def redirect(prefix: Path) -> None:
    """Let the environment's programs and what is sourced name its own place, wherever they were made."""
    for program in (prefix / "bin").iterdir():
        if program.is_symlink() or not program.is_file():
            continue
        text = program.read_bytes()
        if head := HEAD.match(text):
            program.write_bytes(shebang(f"{prefix}/bin/python") + text[head.end() :])
    base = Path(sys.executable).resolve()
    subprocess.run([base, "-m", "venv", "--without-pip", str(prefix)], check=True)  # bin/activate


def shebang(python: str) -> bytes:
    """Return a program's first lines; as pip, go through the shell where the kernel cannot read the path."""
    if " " not in python and len(python) < LONGEST:
        return f"#!{python}\n".encode()
    return f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n".encode()


def install(extra: str, environment: Mapping[str, str], log: Path) -> None:
    """Install the project with `extra` ("" for none). Raise Refusal, or CalledProcessError when pip fails."""
    wanted, index = environment.get("TORCH") or "auto", environment.get("TORCH_INDEX", "")
    gpu = has_gpu()
    choice = choose(wanted, index, gpu, bool(index) and answers(index))
    source = ["-c", CONSTRAINTS, *(["--extra-index-url", choice.index] if choice.index else [])]
    what = f"installing {extra}" if extra else announce(wanted, gpu, takes_cuda(source), choice.note)
    print(f"{what} (some minutes; log: {log})", flush=True)
    wanted_here = [*source, "-e", f".[{extra}]" if extra else "."]
    if uv(log, wanted_here, environment):
        compile_programs()
    else:
        pip(log, "install", *wanted_here)


def uv(log: Path, wanted: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Let uv install what pip's arguments `wanted` name, with pip's settings; False where it cannot."""
    settings = translate(pip_settings())
    if settings is None:
        return False
    options, variables = settings
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    command += [
        "--index-strategy",
        "unsafe-best-match",
        *options,
        *wanted,
    ]  # the newest of all places, as pip
    try:
        pip(log, "install", "-c", CONSTRAINTS, "uv")
        logged(log, command, {**environment, **variables})
    except subprocess.CalledProcessError:
        return False
    return True


def pip_settings() -> str:
    """Return what pip's files and variables say, as it lists it: a line each, such as global.timeout='9'."""
    done = subprocess.run([*_pip(), "config", "list"], capture_output=True, text=True, check=False)
    return done.stdout


def translate(settings: str) -> tuple[list[str], dict[str, str]] | None:
    """Return uv's options and variables for pip's settings; None where one has no counterpart."""
    found: dict[str, str] = {}
    lines = [re.fullmatch(r"(global|install|:env:)\.([\w-]+)=(.*)", line) for line in settings.splitlines()]
    for section in ("global", "install", ":env:"):  # a later one counts more
        found |= {line[2]: ast.literal_eval(line[3]) for line in lines if line and line[1] == section}
    options: list[str] = []
    variables: dict[str, str] = {}
    for key, value in found.items():
        if key in OPTIONS:
            options += [part for each in value.split() for part in (OPTIONS[key], each)]
        elif key == "no-index":
            options += ["--no-index"] * (value.lower() in ("1", "true", "yes", "on"))
        elif key in VARIABLES:
            variables[VARIABLES[key]] = value
        elif key not in HARMLESS:
            return None
    return options, variables


def compile_programs() -> None:
    """Compile what the programs import, whatever the environment says of bytecode."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    running = [
        subprocess.Popen([sys.executable, "-c", f"import {names}"], env=environment) for names in PROGRAMS
    ]
    for process in running:
        process.wait()


def pip(log: Path, *arguments: str) -> None:
    """Run pip into the log. Raise CalledProcessError when it fails."""
    logged(log, [*_pip(), *arguments], os.environ)


def logged(log: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command, whose output goes to the log's end. Raise CalledProcessError when it fails."""
    with log.open("a", encoding="utf-8") as out:
        subprocess.run(command, env=dict(environment), stdout=out, stderr=subprocess.STDOUT, check=True)


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def main(now: str, extra: str = "") -> int:
    """Install the extra, or the project alone, and write `now` into its stamp. Return the exit code."""
    prefix = Path(sys.prefix)
    name = f"-{extra}" if extra else ""
    log, stamp = prefix / f"install{name}.log", prefix / f".installed{name}"
    try:
        log.unlink(missing_ok=True)
        times = stamp.stat() if stamp.is_file() else None
        if times and not extra and moved(stamp.read_text(encoding="utf-8").strip(), now):
            print(
                "the checkout is in another place than it was installed in: directing .venv to it", flush=True
            )
            redirect(prefix)
            if all(Path(source).stat().st_mtime <= times.st_mtime for source in SOURCES):
                pip(log, "install", "--no-deps", "--no-build-isolation", "-e", ".")
                stamp.write_text(f"{now}\n", encoding="utf-8")
                os.utime(
                    stamp, ns=(times.st_atime_ns, times.st_mtime_ns)
                )  # what follows it is not made again
                return 0
        install(extra, os.environ, log)
        stamp.write_text(f"{now}\n", encoding="utf-8")
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        print("\n".join(lines[-TAIL:]), file=sys.stderr)
        print(f"error: pip ended with exit code {error.returncode}; all that it said: {log}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
