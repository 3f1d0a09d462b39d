"""Several seeds' runs, read and checked to be answers to the same questions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgpo_core.errors import UserError
from dgpo_core.reporting import inputs
from dgpo_core.reporting.curves import Curve, read_curves
from dgpo_core.reporting.inputs import MEASUREMENTS, read_arcap, read_scores
from dgpo_core.reporting.results import AVERAGE

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
