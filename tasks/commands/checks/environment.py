"""Python, the installed packages, locale and limits of the process."""

import locale
import resource
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from tasks.commands.checks.finding import Finding, error, ok, warning

PACKAGE = "dgpo"
CONSTRAINTS = Path("constraints/main.txt")
OPEN_FILES = 4096  # Qdrant's segments, data loaders and sockets
INSTALL = "make (or pip install -c constraints/main.txt -e '.[dev]')"


def environment() -> list[Finding]:
    return [_python(), *packages(), _text(), _limits()]


def _python() -> Finding:
    # an older one could not have read these sources: whether it is old enough is pip's question
    return ok("python", f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")


def packages(constraints: Path = CONSTRAINTS) -> list[Finding]:
    """Installed versions against pyproject's ranges (errors) and the tested ones (one warning)."""
    try:
        declared = [Requirement(text) for text in requires(PACKAGE) or []]
    except PackageNotFoundError:
        return [error("packages", f"{PACKAGE} is not installed in this environment", INSTALL)]
    wanted = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
    findings = [finding for r in wanted if (finding := _package(r))]
    other = _untested({canonicalize_name(r.name) for r in wanted}, constraints)
    if other:
        findings.append(
            warning("packages", f"other versions than the tested ones: {', '.join(other)}", INSTALL)
        )
    return findings or [ok("packages", f"{len(wanted)} in their ranges, with the tested versions")]


def _package(requirement: Requirement) -> Finding | None:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return error("packages", f"{requirement.name} is missing", INSTALL)
    if not requirement.specifier.contains(found, prereleases=True):
        wanted = f"{requirement.name}{requirement.specifier}"
        return error("packages", f"{requirement.name} {found} is installed, {wanted} is needed", INSTALL)
    return None


def _untested(names: set[NormalizedName], constraints: Path) -> list[str]:
    """`name installed (tested)` of direct dependencies that differ from the constraint file."""
    if not constraints.is_file():
        return []
    lines = [line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines()]
    pairs = (line.split("==", 1) for line in lines if "==" in line)
    tested = {canonicalize_name(name): wanted for name, wanted in pairs}
    different = []
    for name in sorted(names & tested.keys()):
        with suppress(PackageNotFoundError):  # missing ones are told of already
            found = version(name).split("+")[0]  # a local build of torch is the same version
            if found != tested[name]:
                different.append(f"{name} {found} ({tested[name]})")
    return different


def _text() -> Finding:
    encoding = locale.getpreferredencoding(False)
    if encoding.lower().replace("-", "") != "utf8":
        return warning(
            "locale", f"texts are read and written as {encoding}", "set LANG=C.UTF-8 (or PYTHONUTF8=1)"
        )
    return ok("locale", encoding)


def _limits() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        higher = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        return warning(
            "open files", f"at most {soft}", f"ulimit -n {higher} in the shell that starts the run"
        )
    return ok("open files", "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft}")
