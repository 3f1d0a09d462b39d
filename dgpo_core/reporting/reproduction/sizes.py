"""Several pairs of models side by side (the paper's figure 3 and table 3): EM by size and family.

Built from the seeds' records of several profiles. A cell pools the seeds that ran the model with this
profile; the claims compare pairs of models, on the seeds that all of them ran.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import AVERAGE
from dgpo_core.reporting.formats import GIVEN, as_json, model_label, write_texts
from dgpo_core.reporting.reproduction.claims import Claim, Contrast, Criterion, Untested, beats, both
from dgpo_core.reporting.reproduction.render import sizes_markdown, sizes_page
from dgpo_core.reporting.reproduction.seeds import (
    RECORD,
    Samples,
    SeedRecord,
    SeedResults,
    entry,
    find_records,
    pool,
    read_record,
    read_runs,
    require_comparable,
    stacked,
)
from dgpo_core.reporting.reproduction.verdicts import Judge, of_contrasts, published

COMPARED = (*GIVEN, "ppo", "kd", "dgpo")
Row = dict[str, Any]


@dataclass(frozen=True)
class ModelPair:
    """A profile's student and teacher, and what its seeds measured: model -> seed -> EM of every question."""

    name: str
    record: SeedRecord
    commits: dict[str, str]  # seed -> of the code that it ran
    em: dict[str, dict[int, Samples]]

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
    rows = [_row(pair) for pair in pairs]
    seeds = _common_seeds(pairs)
    judge = Judge(_merged(pairs, seeds), _paper(pairs), {})
    verdicts = [judge.verdict(claim, "") for claim in claims(pairs if seeds else [])]
    found = {"models": list(COMPARED), "seeds": seeds, "pairs": rows, "verdicts": verdicts}
    texts = {
        "sizes.json": as_json(found),
        "sizes.md": sizes_markdown(found),
        "sizes.html": sizes_page(found),
    }
    write_texts(out, texts)
    return [pair.name for pair in pairs]


def claims(pairs: list[ModelPair]) -> list[Claim]:
    """Return what the paper says across its pairs of models, as claims about these pairs."""
    students = list({pair.given("student"): pair for pair in pairs if "ppo" in pair.em}.values())
    return [
        Claim(
            "dgpo_best_everywhere",
            "DGPO beats PPO and KD with every pair of models.",
            "section 5.2, table 3",
            _all_of(
                (beats(pair.label("dgpo"), pair.label(other)) for pair in pairs for other in ("ppo", "kd")),
                "needs several pairs of models that ran the same seed",
            ),
        ),
        Claim(
            "rl_lifts_every_size",
            "RL alone lifts students of every size.",
            "section 3.3, figure 3",
            _all_of(
                (beats(pair.label("ppo"), pair.label("student")) for pair in students),
                "needs PPO with students of several sizes",
            ),
        ),
        Claim(
            "rl_small_behind_large",
            "After RL alone, small students stay behind larger ones of their family.",
            "section 3.3, figure 3",
            _all_of(
                (beats(large.label("ppo"), small.label("ppo")) for small, large in _of_one_family(students)),
                "needs PPO with students of several sizes",
            ),
        ),
        Claim(
            "smaller_gap_better",
            "A smaller teacher, nearer to the student, makes a better DGPO.",
            "section 5.2, table 3 (0.329, 0.323)",
            _all_of(
                (beats(near.label("dgpo"), far.label("dgpo")) for near, far in _of_one_student(pairs)),
                "needs two teachers for one student",
            ),
        ),
    ]


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
    records: dict[str, dict[int, tuple[Path, SeedRecord]]] = {}
    for path in find_records(folder):
        record = read_record(path)
        own = records.setdefault(record.profile, {})
        if record.seed in own:
            raise UserError(
                f"{path / RECORD}: {own[record.seed][0]} is seed {record.seed} of this profile too"
            )
        own[record.seed] = path, record
    if not records:
        raise UserError(f"{folder}: no {RECORD} of a seed below it: nothing to compare")
    return [_pair(name, own) for name, own in records.items()]


def _pair(name: str, records: dict[int, tuple[Path, SeedRecord]]) -> ModelPair:
    first = require_comparable(list(records.values()))
    em: dict[str, dict[int, Samples]] = {}
    for model in COMPARED:
        roots = {seed: path for seed, (path, record) in records.items() if model in record.models}
        if roots:
            measured = read_runs(roots, [model], first.mirrors, first.first)
            values = measured.em[model]
            em[model] = {
                seed: Samples(values.keys, values.values[[row]]) for row, seed in enumerate(measured.seeds)
            }
    commits = {str(seed): record.commit for seed, (_, record) in sorted(records.items())}
    return ModelPair(name, first, commits, em)


def _row(pair: ModelPair) -> Row:
    paper_of = published(pair.record.pair)
    return {
        "profile": pair.name,
        "pair": pair.record.pair,
        "families": pair.record.families,
        "parameters": pair.record.parameters,
        "commits": pair.commits,
        "exact_match": {
            model: entry(pool(_of_seeds(own, sorted(own))), sorted(own), paper_of(model, AVERAGE))
            for model, own in pair.em.items()
        },
    }


def _of_seeds(samples: Mapping[int, Samples], seeds: list[int]) -> Samples:
    return stacked([samples[seed] for seed in seeds])


def _common_seeds(pairs: list[ModelPair]) -> list[int]:
    every = [set(own) for pair in pairs for own in pair.em.values()]
    return sorted(set.intersection(*every)) if len(pairs) > 1 else []


def _merged(pairs: list[ModelPair], seeds: list[int]) -> SeedResults:
    em = {
        pair.label(model): _of_seeds(own, seeds) for pair in pairs for model, own in pair.em.items() if seeds
    }
    return SeedResults(seeds, list(em), pairs[0].record.mirrors, em, {}, {})


def _paper(pairs: list[ModelPair]) -> Callable[[Contrast], float | None]:
    """Return (contrast of labels) -> the paper's figure of the pairs that their profiles stand for."""
    cells = {pair.label(model): (pair.record.pair, model) for pair in pairs for model in COMPARED}
    of_cells = of_contrasts(lambda label, quantity: published(cells[label][0])(cells[label][1], quantity))

    def figure(test: Contrast) -> float | None:
        own = [cells[label] for _, label, _ in test.terms]
        # two profiles that stand for one pair are not two of the paper's models
        return of_cells(test) if len(set(own)) == len(own) else None

    return figure
