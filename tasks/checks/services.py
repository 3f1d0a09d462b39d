"""Ports that the servers want, and servers that the settings name."""

import os
import socket
import urllib.request
from urllib.parse import urlsplit

import psutil

from dgpo_core.config.params import Params
from tasks import services as records
from tasks.checks.finding import Finding, error, ok, warning

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
        return ok(subject, "our server of `make up`")
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
    """Servers that params.yaml or the environment name must answer."""
    addresses = {"PREFECT_API_URL": ("/health", "make up"), "MLFLOW_TRACKING_URI": ("", "make up")}
    findings = []
    for variable, (path, start) in addresses.items():
        url = os.environ.get(variable) or ""
        if url.startswith("http"):
            findings.append(
                _answers(variable, url, url.rstrip("/") + path, f"start it (`{start}`), or unset {variable}")
            )
    location = params.retrieval.location
    if location.startswith("http"):
        advice = "start Qdrant there (docs/paper-scale.md), or set retrieval.location"
        findings.append(_answers("retrieval.location", location, location.rstrip("/") + "/healthz", advice))
    return findings


def _answers(subject: str, url: str, health: str, advice: str) -> Finding:
    shown = urlsplit(url)._replace(query="").geturl()
    shown = shown.replace(f"{urlsplit(url).netloc.rpartition('@')[0]}@", "")  # no password in a report
    try:
        with urllib.request.urlopen(health, timeout=TIMEOUT):
            return ok(subject, f"{shown} answers")
    except OSError as why:
        reason = getattr(why, "reason", why)
        return error(subject, f"{shown} does not answer ({reason})", advice)
