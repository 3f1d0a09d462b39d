"""What several seeds measured: a seed's run kept as a small folder, read, checked and pooled.

    <folder>/<seed>/record.json, evaluation/<model>/{questions,arcap}.parquet, plots/*.csv

Seeds that ran on other machines or days so come into one report: `dgpo pool <folder>`. How the answers of
several seeds become one number with its interval is the package's docstring.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open

from dgpo_core.config.base import Section
from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import (
    AVERAGE,
    EVERY,
    MEASUREMENTS,
    Key,
    Measurement,
    read_arcap,
    read_scores,
    rounded,
)
from dgpo_core.evaluation.statistics import CONFIDENCE, Estimate, mean_of_means
from dgpo_core.files import PART, replacement, write_text
from dgpo_core.reporting.curves import Curve, read_curves
from dgpo_core.reporting.formats import GIVEN, as_json

RECORD = "record.json"
TABLES = ("questions.parquet", "arcap.parquet")


class SeedRecord(Section):
    """Say which code, models and questions a seed's numbers are of."""

    profile: str
    seed: int
    commit: str
    models: list[str]
    mirrors: dict[str, str]  # data set -> the paper's
    pair: str
    first: dict[str, int]  # questions that count, where not all of a set do
    parameters: dict[str, int] = Field({}, description="of the given models")
    families: dict[str, str] = Field({}, description="of the given models: transformers' model_type")

    @property
    def comparable(self) -> dict[str, object]:
        """Return what seeds of one report must have in common."""
        return self.model_dump(exclude={"seed", "commit", "parameters", "families", "models"})


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
        (part / "plots").mkdir()
        for curve in sorted((run / "plots").glob("*.csv")):
            shutil.copyfile(curve, part / "plots" / curve.name)
        counted = record.model_copy(update={"parameters": parameter_counts(run), "families": families(run)})
        write_text(part / RECORD, as_json(counted.model_dump()))
    return out


def find_records(folder: Path) -> list[Path]:
    """Find the folders below `folder` with a seed's record, but for what a killed or running `keep` left."""
    found = (file.parent for file in folder.rglob(RECORD))
    return sorted(path for path in found if path.suffix != PART)


def require_comparable(records: list[tuple[Path, SeedRecord]]) -> SeedRecord:
    """Return the first of the records. Raises UserError naming one that is not comparable with it."""
    start, first = records[0]
    for path, record in records[1:]:
        if record.comparable != first.comparable:
            keys = [k for k, v in record.comparable.items() if v != first.comparable[k]]
            raise UserError(f"{path / RECORD}: not comparable with {start}: {', '.join(keys)}")
    return first


def read_record(path: Path) -> SeedRecord:
    """Read the record in the folder `path`. Raises UserError."""
    try:
        return SeedRecord.model_validate_json((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"{path / RECORD}: {said}") from error


def parameter_counts(root: Path) -> dict[str, int]:
    """Count the parameters of the given models whose folders a run has (`models/<name>/*.safetensors`)."""
    counts = {}
    for name in GIVEN:
        files = sorted((root / "models" / name).glob("*.safetensors"))
        if files:
            counts[name] = sum(_parameters(file) for file in files)
    return counts


def _parameters(file: Path) -> int:
    try:
        with safe_open(file, framework="numpy") as tensors:
            names: list[str] = tensors.keys()
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file: {error}") from error


def families(root: Path) -> dict[str, str]:
    """Read `model_type` of the given models whose folders a run has."""
    found = {}
    for name in GIVEN:
        file = root / "models" / name / "config.json"
        if file.exists():
            try:
                found[name] = str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}: no model_type of transformers: {error}") from error
    return found


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
    mirrors: dict[str, str]  # data set -> the paper's
    em: dict[str, Samples]
    arcap: dict[str, dict[str, Samples]]
    curves: dict[str, list[Curve]]  # recipe -> one a seed

    def of(self, model: str, quantity: str) -> Samples | None:
        """Return EM (of `AVERAGE` or of a data set, by our name or the paper's) or a measurement of ARCap."""
        if model not in self.em:
            return None
        if quantity == AVERAGE:
            return self.em[model]
        if quantity in MEASUREMENTS:
            return self.arcap[model].get(quantity)
        dataset = self.playing(quantity)
        return self.em[model].only(dataset) if dataset else None

    def playing(self, role: str) -> str | None:
        """Return our data set that plays the part of the paper's."""
        if role in self.mirrors:
            return role
        return next((name for name, mirrored in self.mirrors.items() if mirrored == role), None)


def read_runs(
    runs: dict[int, Path],
    models: list[str],
    mirrors: dict[str, str],
    first: Mapping[str, int] = EVERY,
) -> SeedResults:
    """Read the runs of several seeds, {seed: root of the run}; of the sets in `first` only so many questions.

    Raises UserError naming seed and file of what is missing, malformed or not the same questions.
    """
    if not runs or not models or not mirrors:
        raise UserError("a reproduction needs at least one seed, one model and one data set")
    if AVERAGE in mirrors:
        raise UserError(f"no data set may be called {AVERAGE!r}: the results have that row already")
    if len(set(models)) < len(models):
        raise UserError(f"a model is named twice: {', '.join(models)}")
    seeds = sorted(runs)
    em: dict[str, list[Samples]] = {model: [] for model in models}
    arcap: dict[str, list[dict[str, Samples]]] = {model: [] for model in models}
    curves = []
    for seed in seeds:
        evaluation = runs[seed] / "evaluation"
        try:
            for model, scores in read_scores(evaluation, models, list(mirrors), first).items():
                em[model].append(Samples(scores.keys, scores.values["em"][np.newaxis]))
            for model, measured in read_arcap(evaluation, models).items():
                arcap[model].append({name: _samples(own) for name, own in measured.items()})
            curves.append({c.recipe: c for c in read_curves(runs[seed] / "plots") if c.recipe in models})
        except UserError as error:
            raise UserError(f"seed {seed}: {error}") from error
    _require_same_questions(runs, seeds, em, arcap)
    _require_same_curves(runs, seeds, curves)
    return SeedResults(
        seeds,
        models,
        mirrors,
        {model: stacked(own) for model, own in em.items()},
        {model: {name: stacked([s[name] for s in own]) for name in own[0]} for model, own in arcap.items()},
        {recipe: [own[recipe] for own in curves] for recipe in curves[0]},
    )


def _samples(measured: Measurement) -> Samples:
    return Samples([("", name) for name in measured.question_ids], measured.values[np.newaxis])


def stacked(samples: Sequence[Samples]) -> Samples:
    """Put the seeds of several samples of the same questions together."""
    return Samples(samples[0].keys, np.concatenate([each.values for each in samples]))


def _require_same_questions(
    runs: dict[int, Path],
    seeds: list[int],
    em: dict[str, list[Samples]],
    arcap: dict[str, list[dict[str, Samples]]],
) -> None:
    """Refuse seeds that asked other questions. Within a seed, `read_scores` has compared the models' test
    questions; those of ARCap are compared here."""
    for model in em:
        for index, seed in enumerate(seeds):
            if em[model][index].keys != em[model][0].keys:
                path = runs[seed] / "evaluation" / model / "questions.parquet"
                raise UserError(f"seed {seed}: {path}: not the questions that seed {seeds[0]} asked")
    reference = next(iter(arcap.values()))[0]
    for model, own in arcap.items():
        for seed, measurements in zip(seeds, own, strict=True):
            if {n: s.keys for n, s in measurements.items()} != {n: s.keys for n, s in reference.items()}:
                path = runs[seed] / "evaluation" / model / "arcap.parquet"
                first = f"{next(iter(arcap))} of seed {seeds[0]}"
                raise UserError(f"seed {seed}: {path}: not the measurements and questions of {first}")


def _require_same_curves(runs: dict[int, Path], seeds: list[int], curves: list[dict[str, Curve]]) -> None:
    every = {recipe for own in curves for recipe in own}
    for seed, own in zip(seeds, curves, strict=True):
        if missing := sorted(every - set(own)):
            raise UserError(
                f"seed {seed}: {runs[seed] / 'plots'}: no curve of {missing[0]}, which others have"
            )


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
    return PooledEstimate(
        estimate, [_own_mean(samples, strata, seed) for seed in range(len(samples.values))], failed
    )


def _own_mean(samples: Samples, strata: Sequence[np.ndarray], seed: int) -> float:
    own = [values[seed][~np.isnan(values[seed])] for values in strata]
    return math.nan if any(values.size == 0 for values in own) else float(np.mean([v.mean() for v in own]))


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


def entry(pooled: PooledEstimate, seeds: Sequence[int], paper: float | None) -> dict[str, object]:
    """Return one cell of a table, ready for JSON."""
    estimate = pooled.estimate
    return {
        "mean": rounded(estimate.mean),
        "ci95": rounded([estimate.low, estimate.high]),
        "n": estimate.n,
        "failed": pooled.failed,
        "seeds": {str(seed): rounded(mean) for seed, mean in zip(seeds, pooled.seeds, strict=True)},
        "seed_sd": rounded(pooled.spread),
        "paper": rounded(paper),
    }
