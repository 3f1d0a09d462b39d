"""Ports that the servers want, and servers that the settings name."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from dgpo_core.config.agent import RolloutConfig
from dgpo_core.config.params import Params
from dgpo_core.config.retrieval import parse_location
from dgpo_core.errors import without_credentials
from tasks.commands.checks.finding import Finding, error, ok, warning
from tasks.project import servers as records

TIMEOUT = 2.0
# name -> (variable that names another port, if any; default port)
PORTS: dict[str, tuple[str | None, int]] = {
    "Prefect": ("PREFECT_PORT", 4200),
    "MLflow": ("MLFLOW_PORT", 5000),
    "Qdrant": ("QDRANT_PORT", 6333),
    "retriever or vLLM's server": (None, 8000),
    "agent (dgpo serve)": ("AGENT_PORT", 8080),
}


def services(params: Params) -> list[Finding]:
    return [*(port(name, *where) for name, where in PORTS.items()), *named(params)]


def port(name: str, variable: str | None, default: int) -> Finding:
    """Free, ours, or somebody's."""
    number = int((os.environ.get(variable) if variable else None) or default)
    subject = f"port {number}, {name}"
    with socket.socket() as probe:
        probe.settimeout(TIMEOUT)
        if probe.connect_ex(("127.0.0.1", number)) != 0:
            return ok(subject, "free")
    record = records.read(name.lower()) if name in ("Prefect", "MLflow") else None
    if record and records.leader(record):
        return ok(subject, "our server of `dgpo up`")
    other = f"set {variable}" if variable else "give yours another port"
    advice = f"if that is not the {name} you want, end it or {other}"
    return warning(subject, f"in use by {_owner(number)}", advice)


def _owner(number: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == number and connection.pid:
                process = psutil.Process(connection.pid)
                return f"process {process.pid}: {' '.join(process.cmdline())[:80]}"
    except psutil.Error:
        pass
    return "a process that is not visible from here"


def named(params: Params) -> list[Finding]:
    """Servers of the environment, which every stage uses and must answer; and those of params.yaml, which may
    be started later, before the stages that need them."""
    findings = []
    for variable in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        url = os.environ.get(variable) or ""
        if url.startswith("http"):
            advice = f"start it (`dgpo up`), or unset {variable}"
            findings.append(_answer(variable, [url], "/health", error, advice))
    return [*findings, *_retrieval(params.retrieval.location), *_rollout(params.rollout)]


def _retrieval(location: str) -> list[Finding]:
    kind, url = parse_location(location)
    subject = "retrieval.location"
    if kind == "server":
        advice = "start Qdrant there before the stage index (docs/paper-scale.md, 2), or set " + subject
        return [_answer(subject, [url], "/healthz", warning, advice)]
    if kind == "service":
        advice = f"start the service there (`dgpo retriever`, docs/serve.md), or set {subject}"
        known = (200, 404)  # Search-R1's server has no /health
        return [_answer(subject, [url], "/health", warning, advice, known)]
    return []


def _rollout(rollout: RolloutConfig) -> list[Finding]:
    """vLLM's servers: a finding for all copies of the student, and one for the teacher's."""
    if rollout.engine != "vllm-server":
        return []
    findings = []
    for model, urls in (("student", rollout.server.student), ("teacher", rollout.server.teacher)):
        subject = f"rollout.server.{model}"
        advice = "start vLLM there before the stages that generate (docs/paper-scale.md, 3)"
        if urls:
            findings.append(_answer(subject, urls, "/health", warning, f"{advice}, or set rollout.engine"))
        else:
            findings.append(error(subject, "names no server", f"name its URLs, and {advice}"))
    return findings


def _answer(
    subject: str,
    urls: list[str],
    path: str,
    otherwise: Callable[[str, str, str], Finding],
    advice: str,
    known: tuple[int, ...] = (200,),
) -> Finding:
    """Ok when each of `urls` answers GET `path` with a status that is `known`; else `otherwise` is found."""
    # neither a password nor a token in a report
    shown = [without_credentials(url.partition("?")[0]).rstrip("/") for url in urls]
    with ThreadPoolExecutor(len(shown)) as at_once:  # who does not answer is waited for together
        troubles = list(at_once.map(lambda url: _trouble(url, path, known), shown))
    wrong = [f"{url} {trouble}" for url, trouble in zip(shown, troubles, strict=True) if trouble]
    if wrong:
        return otherwise(subject, "; ".join(wrong), advice)
    return ok(subject, f"{', '.join(shown)} {'answers' if len(shown) == 1 else 'answer'}")


def _trouble(url: str, path: str, known: tuple[int, ...]) -> str | None:
    try:
        status = httpx.get(url + path, timeout=TIMEOUT, follow_redirects=True).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as why:
        return f"does not answer ({str(why) or type(why).__name__})"
    return None if status in known else f"answers {status} to GET {path}"
