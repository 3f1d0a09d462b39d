"""`dgpo plan`: what a run needs on a machine, before it is paid for."""

import json
import sys
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from dgpo_core.config.params import Params, load_params, resolve_profile
from dgpo_core.config.retrieval import E5
from dgpo_core.errors import UserError
from dgpo_core.files import parsed_json
from dgpo_core.planning.estimate import Planner
from dgpo_core.planning.plan import Plan, make_plan
from dgpo_core.planning.shapes import architecture_of
from dgpo_core.planning.workload import (
    GIB,
    PASSAGE_WORDS,
    Machine,
    Workload,
    assumed,
    expected_counts,
    first_measured,
)
from dgpo_core.reporting.paper import paper_exact_match
from tasks.commands.use import profile_path
from tasks.project.dvc import Lock, read_lock
from tasks.project.paths import EVALUATION, INDEX, METRICS, TEACHER_EPISODES, questions_file

ENCODER = "retrieval.encoder.model"
EPISODES = ("models", "protocol", "questions")  # parameters that an episode's length and success hang on


def plan_for(params: Params, machine: Machine) -> Plan:
    """Plan with what earlier runs in this working tree have measured, else with the paper's figures. An
    encoder of unknown shape is planned as a usual one, with a note of that."""
    student, work = architecture_of(params.models.student), workload(params)
    encoder, teacher = None, student  # an endpoint's shape is not known, and nothing here depends on it
    if params.models.endpoint is None:
        teacher = architecture_of(params.models.teacher)
    if params.retrieval.has_encoder:
        try:
            encoder = architecture_of(params.retrieval.encoder.model)
        except UserError as why:
            encoder, note = architecture_of(E5), f"{why}; planned as if it were {E5}"
            work = replace(work, sources=work.sources | {ENCODER: note})
    return make_plan(Planner(params, student, teacher, encoder, work, machine))


def workload(params: Params) -> Workload:
    """Return what this experiment's stages have measured in this working tree, else what is expected."""
    lock = read_lock()
    train, test, passages = expected_counts(params)
    guessed = "a guess, until `dvc repro index` has counted them"
    expected = guessed if params.data.source == "files" else "expected"
    words, sources = PASSAGE_WORDS, {"questions and passages": expected}
    if _ran(lock, "data", params, "data", "world", "questions"):
        train |= {name: lines for name in train if (lines := _lines(name, "train"))}
        test |= {name: lines for name in test if (lines := _lines(name, "test"))}
        manifest = _json(INDEX / "manifest.json")
        passages, words = manifest.get("passages", passages), manifest.get("average_words", words)
        sources["questions and passages"] = "counted in data/questions and data/index"
    limit = params.teach.questions
    train = {name: min(count, limit or count) for name, count in train.items()}
    taught = _ran(lock, "teach", params, *EPISODES)
    evaluated = sorted(EVALUATION.glob("*/episodes.parquet"))
    files = [file for file in evaluated if _ran(lock, f"evaluate@{file.parent.name}", params, *EPISODES)]
    lengths = first_measured([TEACHER_EPISODES, *files] if taught else files) or assumed(
        params.protocol, params.retrieval.top_k
    )
    correct = paper_em(params, "teacher", params.questions.train)
    sources["teacher's correct episodes"] = f"{correct:.0%}, the paper's teacher on the test sets"
    if taught and (kept := _json(METRICS / "filter.json")):
        correct, sources["teacher's correct episodes"] = kept["kept"] / kept["raw"], "metrics/filter.json"
    gated = 1 - paper_em(params, "dgpo", params.questions.train)
    sources["episodes with an open gate"] = f"{gated:.0%}, the paper's DGPO on the test sets"
    for recipe in params.recipes.reinforce:
        path = METRICS / f"reinforce-{recipe}.json"
        if _ran(lock, f"reinforce@{recipe}", params, *EPISODES) and "em" in (measured := _json(path)):
            gated, sources["episodes with an open gate"] = 1 - measured["em"], str(path)
    return Workload(train, test, passages, words, lengths, correct, gated, sources)


def _ran(lock: Lock, stage: str, params: Params, *keys: str) -> bool:
    """Tell whether the stage's last run had these parameters: what another profile left tells nothing."""
    wanted = params.model_dump(mode="json")
    try:
        return all(lock[stage].param(key) == wanted[key] for key in keys)
    except KeyError:  # it has not run, or as an earlier version of it
        return False


def paper_em(params: Params, recipe: str, sets: list[str]) -> float:
    """Return the paper's mean EM over `sets`, or over all where a set plays none of the paper's parts."""
    row = paper_exact_match(params.pair)[recipe]
    columns = [params.questions.test.get(name) or "avg" for name in sets]
    return sum(row[column] for column in columns) / len(columns)


def _lines(name: str, split: str) -> int:
    path = questions_file(name, split)
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty where there is no such file. Raises UserError for what is no JSON."""
    try:
        content = parsed_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def plan(profile: str | None, file: Path, machine: Machine, processes: int | None, as_json: bool) -> int:
    """Print the plan of a profile, else of a params.yaml; 1 when something does not fit."""
    params = _params(profile, file)
    if processes is not None:
        compute = params.compute.model_copy(update={"processes": processes})
        params = params.model_copy(update={"compute": compute})
    made = plan_for(params, machine)
    if as_json:
        print(json.dumps(made.to_json(), indent=2))
    else:
        show(made, params)
    return 1 if made.problems else 0


def usual_gpus(profile: str | None, file: Path, gpu: str | None) -> int:
    """Return the number of GPUs to plan with where only their kind, `gpu`, may have been said."""
    return 0 if gpu is None and _params(profile, file).compute.device == "cpu" else 8


def _params(profile: str | None, file: Path) -> Params:
    return Params.model_validate(resolve_profile(profile_path(profile))) if profile else load_params(file)


def show(made: Plan, params: Params) -> None:
    """Print the plan as a table, its assumptions, and what does not fit."""
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
    machine, paid = made.machine, not isnan(made.cost)
    place = f"{machine.gpus} x {machine.device.name}" if machine.gpus else "no GPU"
    console.print(f"profile {params.profile} on {place}\n")
    columns = ["GPUs", "device memory", "host memory", "disk", "tokens", "FLOPs", "hours", *["cost"] * paid]
    table = Table(Column("stage", no_wrap=True), box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for s in made.stages:
        hours = s.seconds / 3600
        row = [s.stage, str(s.gpus or "-"), gib(s.device_memory), gib(s.host), gigabytes(s.disk)]
        row += [
            quantity(s.tokens),
            f"{s.flops:.1e}" if s.flops else "-",
            "?" if isnan(hours) else f"{hours:.1f}",
        ]
        table.add_row(*row, *[f"{hours * machine.price * max(1, machine.gpus):.0f}"] * paid)
    console.print(table)
    total = "unknown: name a GPU of the table" if isnan(made.hours) else f"{made.hours:.1f}"
    cost = f"   cost {made.cost:.0f}" if paid else ""
    console.print(f"\nhours, one stage after another: {total}{cost}   disk: {gigabytes(made.disk)}")
    largest = max(made.stages, key=lambda s: s.device_memory)
    parts = ", ".join(f"{name} {gib(size)}" for name, size in largest.memory.items() if size >= GIB / 20)
    console.print(f"most memory: {largest.stage}: {parts}, and a tenth for what lies between")
    if made.server:
        needs = f"{gib(made.server['memory'])} memory, {gigabytes(made.server['disk'])} disk"
        console.print(f"Qdrant server, beside the stages: {needs} (up to twice as much while it indexes)")
    for name, text in made.assumptions.items():
        console.print(f"{name}: {text}")
    for problem in made.problems:
        needed, there = problem.amount(problem.needed), problem.amount(problem.available)
        console.print(
            f"\n[bold]does not fit[/]: {problem.stage} needs {needed} of {problem.what}, there are {there}"
            f"\n  what helps: {problem.advice}"
        )
    if not made.problems:
        console.print("\nit fits")


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size else "-"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else "-" if not size else "< 0.1 GB"


def quantity(number: float) -> str:
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return f"{number:.0f}" if number else "-"
