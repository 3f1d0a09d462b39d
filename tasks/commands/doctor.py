"""`dgpo doctor`: whether a run can start here, and what to do where it cannot.

Quick: no model is loaded, torch is not imported, every look at the network has a short time limit.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from dgpo_core.config.params import PARAMS, Params, load_params
from dgpo_core.errors import UserError
from tasks.commands.checks.environment import environment
from tasks.commands.checks.finding import Finding, error, ok
from tasks.commands.checks.hub import hub
from tasks.commands.checks.index import index
from tasks.commands.checks.machine import machine
from tasks.commands.checks.repository import repository
from tasks.commands.checks.services import services
from tasks.commands.checks.store import store
from tasks.commands.checks.vocabulary import vocabulary

COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def examine() -> Iterator[Finding]:
    """All findings, one after another; what depends on params.yaml only where it can be read."""
    yield from environment()
    try:
        params = load_params()
    except UserError as why:
        yield error("settings", str(why), "correct the file, or write a new one (`dgpo use <profile>`)")
        return
    yield ok("settings", f"{PARAMS}, profile {params.profile}")
    checks: tuple[Callable[[Params], list[Finding]], ...] = (
        machine,
        hub,
        vocabulary,
        services,
        store,
        index,
        repository,
    )
    for check in checks:
        yield from check(params)


def doctor(as_json: bool) -> int:
    """Print what was found; 1 when there is an error."""
    found: list[Finding] = []
    console = Console(highlight=False, soft_wrap=True)
    for finding in examine():
        found.append(finding)
        if not as_json:
            colour = COLOURS[finding.level]
            console.print(
                f"[{colour}]{finding.level:8}[/] {escape(finding.subject)}: {escape(finding.message)}"
            )
            if finding.advice:
                console.print(f"           {escape(finding.advice)}")
    levels = Counter(finding.level for finding in found)
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        console.print(f"\n{levels['ok']} ok, {levels['warning']} warnings, {levels['error']} errors")
    return 1 if levels["error"] else 0
