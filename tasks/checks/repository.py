"""git and DVC: whether a run's results can be committed and shared."""

import configparser
from pathlib import Path

from dgpo_core.config.params import Params
from tasks.checks.finding import Finding, error, ok, warning
from tasks.git import ask

TIMEOUT = 20.0


def repository(params: Params) -> list[Finding]:
    """`params`: stages of another pool go through git's and DVC's remotes."""
    status = ask("status", "--porcelain", "--untracked-files=no", timeout=TIMEOUT)
    if status is None:
        return [error("git", "this is no git repository", "clone the project; DVC and runs need git")]
    changed = [line for line in status.splitlines() if line.split()[-1] not in ("params.yaml", "dvc.lock")]
    commit = (ask("rev-parse", "--short", "HEAD", timeout=TIMEOUT) or "").strip() or "no commit yet"
    if changed:
        text = f"{commit}, {len(changed)} tracked files changed"
        findings = [
            warning("git", text, "commit: runs from the dashboard and `make reproduce` start from commits")
        ]
    else:
        findings = [ok("git", commit)]
    return findings + _dvc(params)


def _dvc(params: Params) -> list[Finding]:
    if not Path(".dvc").is_dir():
        return [
            error("DVC", "there is no .dvc here", "run in the project's folder; `dvc init` makes a new one")
        ]
    remote, url = default_remote(Path(".dvc"))
    several = "several machines share stages through git's `origin` and DVC's remote"
    findings = []
    if remote is None:
        findings.append(warning("DVC", "no default remote", f"dvc remote add --default ...: {several}"))
    else:
        findings.append(ok("DVC", f"default remote {remote}: {url}"))
    origin = ask("remote", "get-url", "origin", timeout=TIMEOUT)
    if origin is None and params.workers.pool == "gpu":
        findings.append(warning("git origin", "none", f"git remote add origin ...: {several}"))
    return findings


def default_remote(folder: Path) -> tuple[str | None, str]:
    """Name and address, as `config` and `config.local` have them, without starting DVC."""
    config = configparser.ConfigParser(interpolation=None)
    config.read([folder / "config", folder / "config.local"], encoding="utf-8")
    name = config.get("core", "remote", fallback=None)
    url = ""
    if name is not None:
        section = f'remote "{name}"'
        url = next(
            (config.get(s, "url", fallback="") for s in config.sections() if s.strip("'") == section), ""
        )
    return name, url
