"""Several seeds' runs, read and checked to be answers to the same questions.

Several seeds' answers to the same questions as one number with its interval.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgpo_core.errors import UserError
from dgpo_core.evaluation import results as inputs
from dgpo_core.evaluation.results import AVERAGE, MEASUREMENTS, read_arcap, read_scores, rounded
from dgpo_core.evaluation.statistics import CONFIDENCE, Estimate, mean_of_means
from dgpo_core.reporting.curves import Curve, read_curves

Key = tuple[str, str]  # (data set, question id); ARCap's questions have no data set


@dataclass(frozen=True)
class Samples:
    """One quantity of one model: `values` [seeds, questions], nan where the episode failed."""

    keys: list[Key]
    values: NDArray[np.float64]

    def only(self, dataset: str) -> "Samples":
        chosen = [index for index, key in enumerate(self.keys) if key[0] == dataset]
        return Samples([self.keys[index] for index in chosen], self.values[:, chosen])


@dataclass(frozen=True)
class Measured:
    """What the seeds measured; every model has the same questions in every seed."""

    seeds: list[int]
    models: list[str]
    mirrors: dict[str, str]  # data set -> the paper's
    em: dict[str, Samples]
    arcap: dict[str, dict[str, Samples]]
    curves: dict[str, list[Curve]]  # recipe -> one a seed

    def of(self, model: str, quantity: str) -> Samples | None:
        """EM of `AVERAGE` or of one data set (ours or the paper's name), or a measurement of ARCap."""
        if model not in self.em:
            return None
        if quantity == AVERAGE:
            return self.em[model]
        if quantity in MEASUREMENTS:
            return self.arcap[model].get(quantity)
        dataset = self.playing(quantity)
        return self.em[model].only(dataset) if dataset else None

    def playing(self, role: str) -> str | None:
        """Our data set that plays the part of the paper's."""
        if role in self.mirrors:
            return role
        return next((name for name, mirrored in self.mirrors.items() if mirrored == role), None)


def read_runs(
    runs: dict[int, Path],
    models: list[str],
    mirrors: dict[str, str],
    first: Mapping[str, int] = inputs.EVERY,
) -> Measured:
    """Raises UserError naming seed and file of what is missing, malformed or not the same questions."""
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
            curves.append(_curves(runs[seed] / "plots", models))
        except UserError as error:
            raise UserError(f"seed {seed}: {error}") from error
    _same_questions(runs, seeds, em, arcap)
    _same_curves(runs, seeds, curves)
    return Measured(
        seeds,
        models,
        mirrors,
        {model: _stacked(own) for model, own in em.items()},
        {model: {name: _stacked([s[name] for s in own]) for name in own[0]} for model, own in arcap.items()},
        {recipe: [own[recipe] for own in curves] for recipe in curves[0]},
    )


def _samples(measured: inputs.Measured) -> Samples:
    return Samples([("", name) for name in measured.question_ids], measured.values[np.newaxis])


def _stacked(samples: list[Samples]) -> Samples:
    return Samples(samples[0].keys, np.concatenate([each.values for each in samples]))


def _curves(plots: Path, models: Iterable[str]) -> dict[str, Curve]:
    """The curve of each model that was trained by this run and left one."""
    return {curve.recipe: curve for curve in read_curves(plots) if curve.recipe in models}


def _same_questions(
    runs: dict[int, Path],
    seeds: list[int],
    em: dict[str, list[Samples]],
    arcap: dict[str, list[dict[str, Samples]]],
) -> None:
    """Of ARCap the models' questions are compared too; of the test questions `read_scores` does that."""
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


def _same_curves(runs: dict[int, Path], seeds: list[int], curves: list[dict[str, Curve]]) -> None:
    every = {recipe for own in curves for recipe in own}
    for seed, own in zip(seeds, curves, strict=True):
        if missing := sorted(every - set(own)):
            raise UserError(
                f"seed {seed}: {runs[seed] / 'plots'}: no curve of {missing[0]}, which others have"
            )


@dataclass(frozen=True)
class Pooled:
    """The mean over data sets of the questions' means over seeds, and the mean of each seed by itself."""

    estimate: Estimate
    seeds: list[float]
    failed: int  # episodes left out, over all seeds

    @property
    def spread(self) -> float:
        """Standard deviation of the seeds' means; nan with a single seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else math.nan


def pool(samples: Samples, confidence: float = CONFIDENCE, signed: bool = False) -> Pooled:
    """Mean over the seeds question by question; interval over questions, stratified by data set.

    `signed`: the values are differences. A question counts with the seeds in which it did not fail. Mean and
    interval are nan where a data set has no such question.
    """
    names = list(dict.fromkeys(dataset for dataset, _ in samples.keys))
    strata = [samples.only(name).values for name in names]
    answered = [values[:, ~np.isnan(values).all(axis=0)] for values in strata]
    failed = int(np.isnan(samples.values).sum())
    if not names or any(values.shape[1] == 0 for values in answered):
        nothing = Estimate(math.nan, math.nan, math.nan, sum(values.shape[1] for values in answered))
        return Pooled(nothing, [math.nan] * samples.values.shape[0], failed)
    estimate = mean_of_means([np.nanmean(values, axis=0) for values in answered], confidence, signed)
    return Pooled(estimate, [_own_mean(samples, strata, seed) for seed in range(len(samples.values))], failed)


def _own_mean(samples: Samples, strata: Sequence[np.ndarray], seed: int) -> float:
    own = [values[seed][~np.isnan(values[seed])] for values in strata]
    return math.nan if any(values.size == 0 for values in own) else float(np.mean([v.mean() for v in own]))


def combined(terms: Sequence[tuple[float, Samples]]) -> Samples:
    """The weighted sum question by question and seed by seed; only questions that all terms have.

    A failure in one term is one in the sum: what is compared is always the same question of the same seed.
    """
    places = [{key: index for index, key in enumerate(samples.keys)} for _, samples in terms]
    keys = [key for key in terms[0][1].keys if all(key in place for place in places)]
    columns = [[place[key] for key in keys] for place in places]
    values = sum(
        weight * samples.values[:, own] for (weight, samples), own in zip(terms, columns, strict=True)
    )
    return Samples(keys, np.asarray(values, dtype=np.float64))


def entry(pooled: Pooled, seeds: Sequence[int], paper: float | None) -> dict[str, object]:
    """One cell of a table, ready for JSON."""
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
