"""Seeds kept apart and pooled, against numpy and scipy by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy import stats

from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import Key
from dgpo_core.evaluation.statistics import RESAMPLES, SEED
from dgpo_core.reporting.reproduction.report import pool_seeds
from dgpo_core.reporting.reproduction.seeds import (
    RECORD,
    Samples,
    combined,
    entry,
    given_models,
    keep,
    pool,
)
from tests.dgpo_core.reporting.reproduction.synthetic import MODELS, Runs, coin, curve, make_runs, record

LEVELS = {"student": 0.02, "teacher": 0.8, "kd": 0.3, "dgpo": 0.75}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    runs = make_runs(tmp_path / "runs", [1, 2], MODELS, coin(LEVELS), coin(LEVELS))
    for seed in runs.seeds:
        runs.curves[seed, "distill-kd"] = curve({"loss": [0.3, 0.2], "em": [None, 0.1]})
    runs.save()
    (runs.roots[1] / "models/student").mkdir(parents=True)
    save_file({"a": np.zeros((3, 5))}, runs.roots[1] / "models/student/model.safetensors")
    return runs


def test_seeds_of_two_places_give_the_report_of_one(runs: Runs, tmp_path: Path) -> None:
    here = keep(runs.roots[2], tmp_path / "here", record(2))
    there = keep(runs.roots[1], tmp_path / "there", record(1))
    pooled = tmp_path / "pooled"
    runs.write(tmp_path / "direct", parameters={"student": 15})
    shutil.rmtree(runs.folder)
    pool_seeds([there, here], pooled)
    for name in ("tables.json", "verdicts.json", "results.md", "index.html"):
        assert (pooled / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    assert "commits seed 1 11111111, seed 2 22222222" in (pooled / "results.md").read_text()
    assert json.loads((pooled / "tables.json").read_text())["parameters"] == {"student": 15}


def test_seeds_that_are_not_finished_are_pooled_on_what_all_have(runs: Runs, tmp_path: Path) -> None:
    whole = keep(runs.roots[1], tmp_path / "a", record(1))
    part = keep(runs.roots[2], tmp_path / "a", record(2, models=["dgpo", "kd"]))
    assert pool_seeds([whole, part], tmp_path / "pooled") == {"student": [2], "teacher": [2]}
    found = json.loads((tmp_path / "pooled/tables.json").read_text())
    assert list(found["exact_match"]) == ["kd", "dgpo"]
    assert set(found["exact_match"]["kd"]["average"]["seeds"]) == {"1", "2"}
    other = keep(runs.roots[2], tmp_path / "b", record(3, models=["student"]))
    with pytest.raises(UserError, match="no model is in all of them"):
        pool_seeds([part, other], tmp_path / "none")


def test_a_seed_that_ran_again_takes_the_place_of_the_old_one(runs: Runs, tmp_path: Path) -> None:
    old = keep(runs.roots[1], tmp_path, record(1))
    (old / "left.txt").touch()
    assert keep(runs.roots[1], tmp_path, record(1, commit="f" * 40)) == old
    assert "f" * 40 in (old / RECORD).read_text() and not (old / "left.txt").exists()


def test_what_cannot_be_pooled_is_refused_by_name(runs: Runs, tmp_path: Path) -> None:
    first = keep(runs.roots[1], tmp_path / "a", record(1))
    with pytest.raises(UserError, match="nothing to report"):
        pool_seeds([], tmp_path / "out")
    other = keep(runs.roots[2], tmp_path / "b", record(2, profile="tiny-llama", first={"nq": 3}))
    with pytest.raises(UserError, match=r"2/record\.json: not comparable with .*: profile, first"):
        pool_seeds([first, other], tmp_path / "out")
    again = keep(runs.roots[2], tmp_path / "c", record(1))
    with pytest.raises(UserError, match=r"seed 1 is in .*a/1 too"):
        pool_seeds([first, again], tmp_path / "out")
    (again / RECORD).write_text("{}")
    with pytest.raises(UserError, match=r"c/1/record\.json: "):
        pool_seeds([again], tmp_path / "out")
    with pytest.raises(UserError, match=r"seed 2: .*ppo/questions\.parquet: No such file"):
        keep(runs.roots[2], tmp_path / "d", record(2, models=["ppo"]))
    assert not (tmp_path / "out").exists() and not (tmp_path / "d" / "2").exists()


def test_given_models_are_described_by_their_files(tmp_path: Path) -> None:
    assert given_models(tmp_path) == {"parameters": {}, "families": {}}
    folder = tmp_path / "models/teacher"
    folder.mkdir(parents=True)
    save_file({"a": np.zeros((3, 5)), "b": np.zeros(2)}, folder / "model-1.safetensors")
    save_file({"c": np.zeros(4)}, folder / "model-2.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert given_models(tmp_path) == {"parameters": {"teacher": 21}, "families": {"teacher": "llama"}}
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"teacher/config\.json: no model_type"):
        given_models(tmp_path)
    (folder / "model-2.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"teacher/model-2\.safetensors: not a safetensors file"):
        given_models(tmp_path)


NAN = float("nan")


def keys(*sizes: int) -> list[Key]:
    return [(f"set{index}", str(number)) for index, size in enumerate(sizes) for number in range(size)]


def random_values(seeds: int, questions: int) -> NDArray[np.float64]:
    return np.random.default_rng(5).integers(0, 2, (seeds, questions)).astype(float)


def test_question_by_question_then_data_set_by_data_set() -> None:
    values = np.array([[1.0, 0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]])
    pooled = pool(Samples(keys(2, 3), values))
    assert pooled.estimate.mean == pytest.approx(((1 + 0.5) / 2 + (1 + 0.5 + 0) / 3) / 2)
    assert pooled.seeds == pytest.approx([(0.5 + 2 / 3) / 2, (1 + 1 / 3) / 2])
    assert pooled.spread == pytest.approx(np.std(pooled.seeds, ddof=1))
    assert (pooled.estimate.n, pooled.failed) == (5, 0)


def test_interval_is_scipys_stratified_bootstrap_of_the_questions_means() -> None:
    values = random_values(3, 70)
    strata = [values[:, :40].mean(axis=0), values[:, 40:].mean(axis=0)]
    for confidence in (0.95, 0.99):
        expected = stats.bootstrap(
            strata,
            lambda a, b, axis: (a.mean(axis=axis) + b.mean(axis=axis)) / 2,
            n_resamples=RESAMPLES,
            batch=500,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
        estimate = pool(Samples(keys(40, 30), values), confidence).estimate
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_seeds_that_agree_do_not_make_the_questions_more() -> None:
    """Three identical seeds are one measurement: the interval must not shrink."""
    one = random_values(1, 50)
    three = np.repeat(one, 3, axis=0)
    assert pool(Samples(keys(50), three)).estimate == pool(Samples(keys(50), one)).estimate


def test_failed_episodes_are_left_out_seed_by_seed() -> None:
    values = np.array([[1.0, NAN, NAN, 0.0], [0.0, 1.0, NAN, 1.0]])
    pooled = pool(Samples(keys(4), values))
    assert pooled.estimate.mean == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert pooled.seeds == pytest.approx([0.5, 2 / 3])
    assert (pooled.estimate.n, pooled.failed) == (3, 3)


def test_data_set_with_nothing_but_failures_has_no_mean() -> None:
    values = np.array([[1.0, 1.0, NAN, NAN]])
    cell = entry(pool(Samples(keys(2, 2), values)), [4], 0.1)
    assert (cell["mean"], cell["ci95"], cell["seeds"], cell["n"]) == (None, [None, None], {"4": None}, 2)
    assert (cell["seed_sd"], cell["paper"], cell["failed"]) == (None, 0.1, 2)


def test_contrast_pairs_questions_and_seeds() -> None:
    first = Samples(keys(4), np.array([[1.0, 1.0, NAN, 0.0], [1.0, 0.0, 1.0, 0.0]]))
    second = Samples(list(reversed(keys(4)))[1:], np.array([[1.0, 0.0, 0.0], [0.0, 1.0, NAN]]))
    difference = combined([(1.0, first), (-2.0, second)])
    assert difference.keys == keys(4)[:3]
    expected = [[1.0 - 0.0, 1.0 - 0.0, NAN], [NAN, 0.0 - 2.0, 1.0 - 0.0]]
    np.testing.assert_allclose(difference.values, expected)
    pooled = pool(difference)
    assert pooled.estimate.mean == pytest.approx((1.0 + (1.0 - 2.0) / 2 + 1.0) / 3)
    assert pooled.seeds == pytest.approx([1.0, -0.5])
