"""`dgpo promote` and `dgpo rollback`: who is champion. Every change of the champion goes through here.

As a program, it prints how this working tree's model compares with the champion (flows/pipeline.py).
"""

import contextlib
from datetime import UTC, datetime
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dgpo_core.config.params import Params, load_params
from dgpo_core.errors import UserError
from dgpo_core.evaluation.promotion import (
    HEADS,
    NO_CHAMPION,
    SETUP,
    Candidate,
    Decision,
    cells,
    decide,
    headline,
    read_setup,
)
from tasks.project.dvc import read_lock
from tasks.project.process import run_program
from tasks.tracking.evaluations import BASE, own_version, record_evaluations
from tasks.tracking.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry, Version, store

PROMOTED, KEPT, REFUSED = 0, 1, 2  # exit codes


def promote(number: str | None, dry_run: bool, yes: bool) -> int:
    """Decide about a version (the challenger unless given), and make it champion if every condition holds.

    `dry_run` moves no alias and keeps no decision. `yes` is the approval that is otherwise asked
    for (`promote.approval`). Returns the exit code. Raises UserError when nothing can be decided.
    """
    params = load_params()
    with store() as registry:
        problems = record_evaluations(registry, params, read_lock())
        version = registry.version(number) if number else registry.alias(CHALLENGER)
        if version is None:
            why = problems.get(params.challenger or "") or _how_to_offer(registry, params)
            raise UserError(f"no version is the challenger: {why}")
        champion = registry.alias(CHAMPION)
        if champion and champion.number == version.number:
            print(f"{version.name} is the champion already")
            return PROMOTED
        decision = decide_about(registry, params, version, champion)
        _print(decision)
        if not dry_run:
            registry.store_decision(version, decision)
        if decision.verdict != "promote":
            return REFUSED if decision.verdict == "refused" else KEPT
        if dry_run:
            print("nothing was changed (--dry-run)")
            return PROMOTED
        if not _approved(version, params, yes):
            print(f"not approved: {champion.name if champion else 'nobody'} stays champion")
            return KEPT
        registry.make_champion(version, expected=champion, previous=champion)
    print(f"{version.name} is the champion" + (f"; {champion.name} is `{PREVIOUS}`" if champion else ""))
    return PROMOTED


def _how_to_offer(registry: Registry, params: Params) -> str:
    """Say what to do where nothing was offered yet."""
    known = ", ".join(version.name for version in registry.versions())
    if not known:
        return "no model is registered; run the pipeline (`make demo`), or `dgpo register`"
    return (
        f"`dgpo register --challenger` offers this working tree's model of {params.challenger}, and "
        f"`dgpo promote --version N` judges another one of {known}"
    )


def decide_about(registry: Registry, params: Params, version: Version, champion: Version | None) -> Decision:
    """Decide about `version` from the evaluations that are kept with the versions, and change nothing.

    Raises UserError when a version was rolled back, has no evaluation or no weights.
    """
    if why := version.tags.get("rolled_back_why"):
        raise UserError(
            f"{version.name} was rolled back: {why}; if that no longer holds, delete its tag "
            "`rolled_back_why` in MLflow"
        )
    registry.folder(version)  # a champion that nobody could load is none
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(registry.evaluation(version))
        rival = (
            Candidate(champion.name, champion.hash, stack.enter_context(registry.evaluation(champion)))
            if champion
            else None
        )
        if not champion and not (own / BASE).is_dir():
            raise UserError(
                f"{version.name}: the first champion is compared with the student, which was not evaluated; "
                "put it into `compare` and run `dvc repro report`"
            )
        decision = decide(
            Candidate(version.name, version.hash, own),
            rival,
            _student(own / BASE),
            list(params.questions.test),
            params.promote,
        )
    if decision.verdict == "refused":
        both = [each.reference for each in (version, champion) if each]
        again = " and ".join(f"`dgpo evaluate {reference}`" for reference in both)
        decision.reasons.append(f"evaluate again, with the same questions, index, settings and code: {again}")
    return decision


def standing() -> str:
    """Say how this working tree's model compares with the champion, or with the student where there is none.

    Nothing is changed. Raises UserError for a model that is no version, or has no evaluation.
    """
    params = load_params()
    with store() as registry:
        version, champion = own_version(registry, params, read_lock()), registry.alias(CHAMPION)
        if champion and champion.number == version.number:
            return f"{version.name} is the champion"
        decision = decide_about(registry, params, version, champion)
    gain = decision.gain
    if gain is None:
        return decision.reasons[0]
    rival = f"the champion, {champion.name}" if champion else "the student; there is no champion yet"
    word = "better" if gain.low > 0 else "worse" if gain.high < 0 else "no clear difference"
    interval = f"95 % interval {gain.low:+.3f} to {gain.high:+.3f}"
    return f"{version.name}: {word}, average EM {gain.value:+.3f} ({interval}) against {rival}"


def rollback(reason: str) -> None:
    """Put the previous champion back, and say why with the version that goes. Raises UserError."""
    if not reason.strip():
        raise UserError("--reason: say why, for those who ask later")
    with store() as registry:
        champion, previous = registry.alias(CHAMPION), registry.alias(PREVIOUS)
        if champion is None or previous is None:
            raise UserError("there is no previous champion to go back to")
        registry.folder(previous)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        registry.tag(champion, rolled_back=now, rolled_back_why=reason.strip())
        registry.make_champion(previous, expected=champion, previous=None)
    print(f"{previous.name} is the champion again; {champion.name} was rolled back: {reason.strip()}")


def _student(folder: Path) -> Candidate:
    """Return the student as it was evaluated beside the challenger; it is no registered model."""
    model = read_setup(folder).model if (folder / SETUP).is_file() else ""
    return Candidate("the student", model, folder)


def _approved(version: Version, params: Params, yes: bool) -> bool:
    if yes or not params.promote.approval:
        return True
    try:
        return typer.confirm(f"Make {version.name} the champion?")
    except typer.Abort:
        raise UserError("nobody is here to approve (promote.approval): say --yes") from None


def _print(decision: Decision) -> None:
    console = Console()
    console.print(f"[bold]{escape(headline(decision))}[/bold]", highlight=False, soft_wrap=True)
    if not decision.champion:
        console.print(NO_CHAMPION, soft_wrap=True)
    for reason in decision.reasons:
        console.print(f"- {escape(reason)}", highlight=False, soft_wrap=True)
    if decision.conditions:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for head in HEADS[:-1]:  # why: below, and only where it matters
            table.add_column(head, no_wrap=True)
        for condition in decision.conditions:
            table.add_row(*map(escape, cells(condition)[:-1]), style=None if condition.passed else "red")
        console.print(table)
    for condition in decision.conditions:
        if not condition.passed:
            console.print(
                f"- {escape(condition.name)}: {escape(condition.why)}", highlight=False, soft_wrap=True
            )


if __name__ == "__main__":
    run_program(lambda: print(standing()))
