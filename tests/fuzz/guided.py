"""Fuzzes by coverage: what reaches new branches of ours is kept, and changed again (`make fuzz-guided`).

    python -m tests.fuzz.guided --seconds 60 [TEST ...]

Each test that hypothesis drives gets a process and so many seconds, in which libFuzzer (by Atheris) writes
the bytes that hypothesis draws from: what is tried has the form of the test's inputs. What fails is in
`.hypothesis`, and is tried first when the test itself runs again. In that process this module is a plugin of
pytest, loaded before the sources, whose branches are counted from their import on.
"""

import argparse
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = "DGPO_FUZZ_SECONDS"  # environment: of a test
KEPT = Path(".hypothesis/guided")  # what reached new branches, by test; the next run begins with it
LIMITS = ["-max_len=4096", "-len_control=0", "-rss_limit_mb=6144", "-timeout=120", "-verbosity=1"]
INPUTS = re.compile(r"^#(\d+)\s", re.MULTILINE)
BRANCHES = re.compile(r"\bcov: (\d+)")
FAILURE = "=== Uncaught Python exception: ==="

if SECONDS in os.environ:
    import atheris

    atheris.instrument_imports(include=["dgpo_core", "tasks"]).__enter__()  # to the end of the process


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Give a test of hypothesis to libFuzzer, which ends the process."""
    handle = getattr(pyfuncitem.obj, "hypothesis", None)
    if SECONDS not in os.environ or handle is None:
        return None
    fixtures = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    inner = handle.inner_test

    def test(**drawn: object) -> object:
        return inner(**fixtures, **drawn)

    handle.inner_test = test
    pyfuncitem.obj.__signature__ = inspect.Signature()  # nothing is left to give
    run = handle.fuzz_one_input

    def try_bytes(content: bytes) -> None:
        run(content)

    kept = KEPT / re.sub(r"\W+", "-", pyfuncitem.nodeid)
    kept.mkdir(parents=True, exist_ok=True)
    time = f"-max_total_time={os.environ[SECONDS]}"
    atheris.Setup([sys.argv[0], *LIMITS, time, f"-artifact_prefix={kept}-", str(kept)], try_bytes)
    atheris.Fuzz()
    return True


def collected(tests: list[str]) -> list[str]:
    """Return the names of the tests in files or folders."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *tests]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "::" in line]


def fuzzed(test: str, seconds: int) -> tuple[int, int, str]:
    """Return how many inputs a test was given, the branches they reached, and how it failed, if it did."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "tests.fuzz.guided", test]
    environment = os.environ | {SECONDS: str(seconds)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.decode("utf-8", "replace")
    inputs, branches = INPUTS.findall(said), BRANCHES.findall(said)
    _, _, found = said.partition(FAILURE)
    failure = f"{found[:3000] or said[-3000:]}\n" if done.returncode else ""
    return int(inputs[-1]) if inputs else 0, int(branches[-1]) if branches else 0, failure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", metavar="TEST", default=["tests/fuzz"])
    parser.add_argument("--seconds", type=int, default=300, help="of each test")
    given = parser.parse_args()
    total, failed = 0, []
    for test in collected(given.tests):
        inputs, branches, failure = fuzzed(test, given.seconds)
        if not inputs and not failure:
            continue  # hypothesis does not drive it
        verdict = "FAILED" if failure else "passed"
        print(f"{failure}{inputs:>8,} inputs {branches:>6,} branches  {verdict}  {test}", flush=True)
        failed += [test] * bool(failure)
        total += inputs
    print(f"{total:,} inputs; {len(failed)} tests failed: {', '.join(failed) or '-'}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
