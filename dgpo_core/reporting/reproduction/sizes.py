"""Several pairs of models side by side (the paper's figure 3 and table 3): EM by size and family.

Built from the seeds' records of several profiles. A cell pools the seeds that ran the model with this
profile; the claims compare pairs of models, on the seeds that all of them ran.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import AVERAGE
from dgpo_core.reporting.formats import as_json, model_label, write_texts
from dgpo_core.reporting.paper import paper_figure
from dgpo_core.reporting.reproduction.claims import PROFILED, Criterion, Untested, beats, both, make_claims
from dgpo_core.reporting.reproduction.render import sizes_markdown, sizes_page
from dgpo_core.reporting.reproduction.seeds import (
    RECORD,
    Samples,
    SeedRecord,
    SeedResults,
    by_seed,
    entry,
    find_records,
    pool,
    read_record,
    read_runs,
)
from dgpo_core.reporting.reproduction.verdicts import Judge

Row = dict[str, Any]


@dataclass(frozen=True)
class ModelPair:
    """A profile's student and teacher, and what the seeds measured that ran a model with it."""

    name: str
    record: SeedRecord
    commits: dict[str, str]  # seed -> of the code that it ran
    measured: dict[str, SeedResults]  # model -> of this model

    def given(self, role: str) -> tuple[str, float]:
        """Return (family, parameters) of student or teacher, by its name in the paper where not counted."""
        if role in self.record.parameters:
            return self.record.families.get(role, ""), self.record.parameters[role]
        large, _, small = self.record.pair.partition("-to-")
        return (f"{self.record.pair.partition('-')[0]} {small if role == 'student' else large}", 0)

    def label(self, model: str) -> str:
        return f"{model_label(model)} ({self.name})"


def write_sizes(folder: Path, out: Path) -> list[str]:
    """Write sizes.json, sizes.md and sizes.html from every record below `folder`, and return the profiles.

    Raises UserError for none, a broken one, and seeds of a profile that cannot be compared.
    """
    pairs = sorted(
        _read(folder), key=lambda pair: (*pair.given("student")[::-1], *pair.given("teacher")[::-1])
    )
    every = [set(results.seeds) for pair in pairs for results in pair.measured.values()]
    seeds = sorted(set.intersection(*every)) if len(pairs) > 1 else []
    published = {pair.label(model): (pair.record.pair, model) for pair in pairs for model in PROFILED}
    judge = Judge(_merged(pairs, seeds), {}, published)
    found = {
        "models": list(PROFILED),
        "seeds": seeds,
        "pairs": [_row(pair) for pair in pairs],
        "verdicts": list(map(judge.verdict, make_claims(criteria(pairs if seeds else []), across=True))),
    }
    texts = {
        "sizes.json": as_json(found),
        "sizes.md": sizes_markdown(found),
        "sizes.html": sizes_page(found),
    }
    write_texts(out, texts)
    return [pair.name for pair in pairs]


def criteria(pairs: list[ModelPair]) -> dict[str, Criterion]:
    """Return the criteria of the claims across pairs of models, for these pairs."""
    students = list({pair.given("student"): pair for pair in pairs if "ppo" in pair.measured}.values())
    sizes = "needs PPO with students of several sizes"
    return {
        "dgpo_best_everywhere": _all_of(
            (beats(pair.label("dgpo"), pair.label(other)) for pair in pairs for other in ("ppo", "kd")),
            "needs several pairs of models that ran the same seed",
        ),
        "rl_lifts_every_size": _all_of(
            (beats(pair.label("ppo"), pair.label("student")) for pair in students), sizes
        ),
        "rl_small_behind_large": _all_of(
            (beats(large.label("ppo"), small.label("ppo")) for small, large in _of_one_family(students)),
            sizes,
        ),
        "smaller_gap_better": _all_of(
            (beats(near.label("dgpo"), far.label("dgpo")) for near, far in _of_one_student(pairs)),
            "needs two teachers for one student",
        ),
    }


def _all_of(criteria: Iterable[Criterion], otherwise: str) -> Criterion:
    parts = tuple(criteria)
    return both(*parts) if parts else Untested(otherwise)


def _of_one_family(students: list[ModelPair]) -> list[tuple[ModelPair, ModelPair]]:
    """Return (smaller, next larger) students of the same family."""
    families: dict[str, list[ModelPair]] = {}
    for pair in students:
        families.setdefault(pair.given("student")[0], []).append(pair)
    return [two for own in families.values() for two in pairwise(own)]


def _of_one_student(pairs: list[ModelPair]) -> list[tuple[ModelPair, ModelPair]]:
    """Return (with the smaller teacher, with the larger one) of the same student."""
    return [
        (first, second)
        for first, second in combinations(pairs, 2)
        if first.given("student") == second.given("student")
        and first.given("teacher")[1] < second.given("teacher")[1]
    ]


def _read(folder: Path) -> list[ModelPair]:
    profiles: dict[str, dict[Path, SeedRecord]] = {}
    for path in find_records(folder):
        record = read_record(path)
        profiles.setdefault(record.profile, {})[path] = record
    if not profiles:
        raise UserError(f"{folder}: no {RECORD} of a seed below it: nothing to compare")
    return [_pair(name, records) for name, records in profiles.items()]


def _pair(name: str, records: dict[Path, SeedRecord]) -> ModelPair:
    folders, first = by_seed(records), next(iter(records.values()))
    measured = {}
    for model in PROFILED:
        if runs := {seed: path for seed, path in folders.items() if model in records[path].models}:
            measured[model] = read_runs(runs, [model], first)
    commits = {str(seed): records[path].commit for seed, path in sorted(folders.items())}
    return ModelPair(name, first, commits, measured)


def _row(pair: ModelPair) -> Row:
    record = pair.record
    return {
        "profile": pair.name,
        "pair": record.pair,
        "families": record.families,
        "parameters": record.parameters,
        "commits": pair.commits,
        "exact_match": {
            model: entry(
                pool(results.samples[model][AVERAGE]),
                results.seeds,
                paper_figure(record.pair, model, AVERAGE),
            )
            for model, results in pair.measured.items()
        },
    }


def _merged(pairs: list[ModelPair], seeds: list[int]) -> SeedResults:
    """Return all pairs' models by their labels, as measured with `seeds`."""
    samples = {}
    for pair in pairs if seeds else ():
        for model, results in pair.measured.items():
            own = results.samples[model][AVERAGE]
            chosen = own.values[[results.seeds.index(seed) for seed in seeds]]
            samples[pair.label(model)] = {AVERAGE: Samples(own.keys, chosen)}
    return SeedResults(seeds, list(samples), pairs[0].record.mirrors, samples, {})
