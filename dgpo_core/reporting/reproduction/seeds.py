"""What several seeds measured: a seed's run kept as a small folder, read, checked and pooled.

    <folder>/<seed>/record.json, evaluation/<model>/{questions,arcap}.parquet, plots/**/*.csv

Seeds that ran on other machines or days so come into one report: `dgpo pool <folder>`. How the answers of
several seeds become one number with its interval is the package's docstring.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open

from dgpo_core.config.base import Section
from dgpo_core.errors import UserError
from dgpo_core.evaluation.power import t_interval
from dgpo_core.evaluation.results import AVERAGE, MEASUREMENTS, Key, read_arcap, read_scores, rounded
from dgpo_core.evaluation.statistics import CONFIDENCE, Estimate, mean_of_means
from dgpo_core.files import PART, parsed_json, replacement, write_text
from dgpo_core.reporting.curves import PROCESSOR_TIME, Curve, read_curves
from dgpo_core.reporting.formats import GIVEN, as_json

RECORD = "record.json"
TABLES = ("questions.parquet", "arcap.parquet")


class SeedRecord(Section):
    """Say which code, models and questions a seed's numbers are of."""

    profile: str
    seed: int
    commit: str
    models: list[str]
    mirrors: dict[str, str | None]  # data set -> the paper's
    pair: str
    first: dict[str, int]  # questions that count, where not all of a set do
    parameters: dict[str, int] = Field({}, description="of the given models")
    families: dict[str, str] = Field({}, description="of the given models: transformers' model_type")
    starts: dict[str, str] = Field({}, description="recipe -> student, or the recipe that it starts from")

    @property
    def comparable(self) -> dict[str, object]:
        """Return what seeds of one report must have in common."""
        return self.model_dump(exclude={"seed", "commit", "parameters", "families", "models", "starts"})


def keep(run: Path, folder: Path, record: SeedRecord) -> Path:
    """Copy what the report reads of a finished run into `folder/<seed>`, in place of what is there.

    Raises UserError for a file that the run does not have.
    """
    out = folder / str(record.seed)
    with replacement(out) as part:
        try:
            for model in record.models:
                (part / "evaluation" / model).mkdir(parents=True)
                for name in TABLES:
                    shutil.copyfile(run / "evaluation" / model / name, part / "evaluation" / model / name)
        except OSError as error:
            raise UserError(f"seed {record.seed}: {error.filename}: {error.strerror}") from error
        (part / "plots" / PROCESSOR_TIME).mkdir(parents=True)
        for curve in sorted((run / "plots").rglob("*.csv")):
            shutil.copyfile(curve, part / curve.relative_to(run))
        write_text(part / RECORD, as_json(record.model_copy(update=given_models(run)).model_dump()))
    return out


def given_models(run: Path) -> dict[str, dict[str, Any]]:
    """Return `parameters` and `families` of the given models whose folders a run has. Raises UserError."""
    parameters, families = {}, {}
    for name in GIVEN:
        folder = run / "models" / name
        if files := sorted(folder.glob("*.safetensors")):
            parameters[name] = sum(map(_parameters, files))
        if (file := folder / "config.json").exists():
            try:
                families[name] = str(parsed_json(file.read_bytes())["model_type"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}: no model_type of transformers: {error}") from error
    return {"parameters": parameters, "families": families}


def _parameters(file: Path) -> int:
    try:
        with safe_open(file, framework="numpy") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file: {error}") from error


def find_records(folder: Path) -> list[Path]:
    """Find the folders below `folder` with a seed's record, but for what a killed or running `keep` left."""
    found = (file.parent for file in folder.rglob(RECORD))
    return sorted(path for path in found if path.suffix != PART)


def read_record(path: Path) -> SeedRecord:
    """Read the record in the folder `path`. Raises UserError."""
    try:
        return SeedRecord.model_validate_json((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"{path / RECORD}: {said}") from error


def by_seed(records: Mapping[Path, SeedRecord]) -> dict[int, Path]:
    """Return the records' folders by seed. Raises UserError for a seed that is there twice, and for a record
    that is not comparable with the first one."""
    start, first = next(iter(records.items()))
    folders: dict[int, Path] = {}
    for path, record in records.items():
        if keys := [key for key, value in record.comparable.items() if value != first.comparable[key]]:
            raise UserError(f"{path / RECORD}: not comparable with {start}: {', '.join(keys)}")
        if record.seed in folders:
            raise UserError(f"{path / RECORD}: seed {record.seed} is in {folders[record.seed]} too")
        folders[record.seed] = path
    return folders


@dataclass(frozen=True)
class Samples:
    """One quantity of one model: `values` [seeds, questions], nan where the episode failed."""

    keys: list[Key]
    values: NDArray[np.float64]

    def only(self, dataset: str) -> "Samples":
        """Return the questions of one data set."""
        chosen = [index for index, key in enumerate(self.keys) if key[0] == dataset]
        return Samples([self.keys[index] for index in chosen], self.values[:, chosen])


@dataclass(frozen=True)
class SeedResults:
    """What the seeds measured. Every model has the same questions in every seed."""

    seeds: list[int]
    models: list[str]
    mirrors: Mapping[str, str | None]  # data set -> the paper's
    samples: dict[str, dict[str, Samples]]  # model -> AVERAGE (EM of all data sets), measurements of ARCap
    curves: dict[str, list[Curve]]  # recipe -> one a seed

    def of(self, model: str, quantity: str) -> Samples | None:
        """Return EM (of `AVERAGE` or of a data set, by our name or the paper's) or a measurement of ARCap."""
        own = self.samples.get(model, {})
        if quantity == AVERAGE or quantity in MEASUREMENTS:
            return own.get(quantity)
        names = [name for name, role in self.mirrors.items() if quantity in (name, role)]
        return own[AVERAGE].only(names[0]) if own and names else None


def read_runs(runs: Mapping[int, Path], models: list[str], record: SeedRecord) -> SeedResults:
    """Read `models` of several seeds, {seed: root of the run}, whose data sets are those of `record`.

    Raises UserError naming seed and file of what is missing, malformed or not the same questions.
    """
    if AVERAGE in record.mirrors:
        raise UserError(f"no data set may be called {AVERAGE!r}: the results have that row already")
    seeds = sorted(runs)
    measured: list[dict[str, dict[str, Samples]]] = []
    curves: list[dict[str, Curve]] = []
    for seed in seeds:
        evaluation = runs[seed] / "evaluation"
        try:
            scores = read_scores(evaluation, models, list(record.mirrors), record.first)
            arcap = read_arcap(evaluation, models)
            curves.append({c.recipe: c for c in read_curves(runs[seed] / "plots") if c.recipe in models})
        except UserError as error:
            raise UserError(f"seed {seed}: {error}") from error
        measured.append(
            {
                model: {AVERAGE: Samples(own.keys, own.values["em"][np.newaxis])}
                | {
                    name: Samples([("", each) for each in asked.question_ids], asked.values[np.newaxis])
                    for name, asked in arcap[model].items()
                }
                for model, own in scores.items()
            }
        )
    _require_the_same(runs, measured, curves)
    return SeedResults(
        seeds,
        models,
        record.mirrors,
        {
            model: {name: _stacked([own[model][name] for own in measured]) for name in measured[0][model]}
            for model in models
        },
        {recipe: [own[recipe] for own in curves] for recipe in curves[0]},
    )


def _stacked(samples: Sequence[Samples]) -> Samples:
    """Put the seeds of several samples of the same questions together."""
    return Samples(samples[0].keys, np.concatenate([each.values for each in samples]))


def _require_the_same(
    runs: Mapping[int, Path],
    measured: Sequence[Mapping[str, Mapping[str, Samples]]],
    curves: Sequence[Mapping[str, Curve]],
) -> None:
    """Refuse seeds that asked other questions or lack curves. Within a seed, `read_scores` has compared the
    models' test questions; their measurements of ARCap are compared here."""
    start, (name, first), *_ = sorted(runs)[0], *measured[0].items()
    recipes = {recipe for own in curves for recipe in own}
    for seed, models, own_curves in zip(sorted(runs), measured, curves, strict=True):
        for model, own in models.items():
            path = runs[seed] / "evaluation" / model
            if own[AVERAGE].keys != first[AVERAGE].keys:
                where = path / "questions.parquet"
                raise UserError(f"seed {seed}: {where}: not the questions that seed {start} asked")
            if {n: s.keys for n, s in own.items()} != {n: s.keys for n, s in first.items()}:
                of = f"{name} of seed {start}"
                where = path / "arcap.parquet"
                raise UserError(f"seed {seed}: {where}: not the measurements and questions of {of}")
        if missing := sorted(recipes - set(own_curves)):
            where = runs[seed] / "plots"
            raise UserError(f"seed {seed}: {where}: no curve of {missing[0]}, which others have")


@dataclass(frozen=True)
class PooledEstimate:
    """The mean over data sets of the questions' means over the seeds, and each seed's own mean."""

    estimate: Estimate
    seeds: list[float]
    failed: int  # episodes left out, over all seeds

    @property
    def spread(self) -> float:
        """Return the standard deviation of the seeds' means; nan with a single seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else math.nan


def pool(samples: Samples, confidence: float = CONFIDENCE, signed: bool = False) -> PooledEstimate:
    """Average over the seeds question by question, with an interval over questions, stratified by data set.

    `signed`: the values are differences. A question counts with the seeds in which it did not fail. Mean and
    interval are nan where a data set has no such question.
    """
    names = list(dict.fromkeys(dataset for dataset, _ in samples.keys))
    strata = [samples.only(name).values for name in names]
    answered = [values[:, ~np.isnan(values).all(axis=0)] for values in strata]
    failed = int(np.isnan(samples.values).sum())
    if not names or any(values.shape[1] == 0 for values in answered):
        nothing = Estimate(math.nan, math.nan, math.nan, sum(values.shape[1] for values in answered))
        return PooledEstimate(nothing, [math.nan] * samples.values.shape[0], failed)
    estimate = mean_of_means([np.nanmean(values, axis=0) for values in answered], confidence, signed)
    return PooledEstimate(estimate, list(map(_own_mean, zip(*strata, strict=True))), failed)


def _own_mean(strata: Sequence[np.ndarray]) -> float:
    """Return a seed's mean over the data sets; nan where one has nothing but failures."""
    own = [values[~np.isnan(values)] for values in strata]
    return float(np.mean([values.mean() for values in own])) if all(map(np.size, own)) else math.nan


def combined(terms: Sequence[tuple[float, Samples]]) -> Samples:
    """Sum the weighted terms question by question and seed by seed, over the questions that all terms have.

    A failure in one term is one in the sum: what is compared is always the same question of the same seed.
    """
    places = [{key: index for index, key in enumerate(samples.keys)} for _, samples in terms]
    keys = [key for key in terms[0][1].keys if all(key in place for place in places)]
    columns = [[place[key] for key in keys] for place in places]
    values = sum(
        weight * samples.values[:, own] for (weight, samples), own in zip(terms, columns, strict=True)
    )
    return Samples(keys, np.asarray(values, dtype=np.float64))


def entry(
    pooled: PooledEstimate, seeds: Sequence[int], paper: float | None, confidence: float = CONFIDENCE
) -> dict[str, object]:
    """Return one cell of a table, ready for JSON; `confidence` is the level of the interval over seeds."""
    estimate = pooled.estimate
    return {
        "mean": rounded(estimate.mean),
        "ci95": rounded([estimate.low, estimate.high]),
        "n": estimate.n,
        "failed": pooled.failed,
        "seeds": {str(seed): rounded(mean) for seed, mean in zip(seeds, pooled.seeds, strict=True)},
        "seed_sd": rounded(pooled.spread),
        "seeds_ci95": rounded(list(t_interval(pooled.seeds, confidence))),
        "paper": rounded(paper),
    }
