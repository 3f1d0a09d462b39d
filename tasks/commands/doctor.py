"""`dgpo doctor`: whether a run can start here, and what to do where it cannot.

Quick: no model is loaded, and every look at the network has a short time limit.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from dgpo_core.config.params import PARAMS, load_params
from dgpo_core.errors import UserError
from tasks.commands import checks
from tasks.commands.checks import Finding

COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def examine() -> Iterator[Finding]:
    """Yield all findings, one after another; of params.yaml only where it can be read."""
    yield from checks.environment()
    try:
        params = load_params()
    except UserError as why:
        advice = "correct the file, or write a new one (`dgpo use <profile>`)"
        yield checks.error("settings", str(why), advice)
        return
    yield checks.ok("settings", f"{PARAMS}, profile {params.profile}")
    for check in (
        checks.machine,
        checks.hub,
        checks.vocabulary,
        checks.servers,
        checks.store,
        checks.repository,
    ):
        yield from check(params)


def doctor(as_json: bool) -> int:
    """Print all findings. Return the exit code: 1 when there is an error."""
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
