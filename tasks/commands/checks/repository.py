"""git and DVC: whether a run's results can be committed and shared."""

from pathlib import Path

from dgpo_core.config.params import Params
from tasks.commands.checks.finding import Finding, error, ok, warning
from tasks.project.dvc import Problem, problems, read_config
from tasks.project.git import ask

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
            warning("git", text, "commit: runs from the dashboard and `dgpo reproduce` start from commits")
        ]
    else:
        findings = [ok("git", commit)]
    return findings + _dvc(params)


def _dvc(params: Params) -> list[Finding]:
    if found := problems():
        return [error("DVC", problem.message, problem.advice) for problem in found]
    remote, url = default_remote()
    several = "several machines share stages through git's `origin` and DVC's remote"
    findings = []
    if remote is None:
        findings.append(warning("DVC", "no default remote", f"dvc remote add --default ...: {several}"))
    elif url is None:
        advice = "`dvc remote add --default NAME URL`, or `dvc config core.remote NAME` of one that there is"
        findings.append(error("DVC", f"core.remote names {remote!r}, and there is no such remote", advice))
    else:
        findings.append(ok("DVC", f"default remote {remote}: {url}"))
    origin = ask("remote", "get-url", "origin", timeout=TIMEOUT)
    if origin is None and params.workers.pool == "gpu":
        findings.append(warning("git origin", "none", f"git remote add origin ...: {several}"))
    return findings


def default_remote(root: Path = Path()) -> tuple[str | None, str | None]:
    """Return name and address of DVC's default remote; no address where it is not defined."""
    config = read_config(root)
    if isinstance(config, Problem) or (name := config["core"].get("remote")) is None:
        return None, None
    return name, config["remote"].get(name, {}).get("url")
