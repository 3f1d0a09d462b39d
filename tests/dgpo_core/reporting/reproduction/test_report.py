"""From runs on disk to the four files."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import MEASUREMENTS
from dgpo_core.reporting.curves import Curve, Points, mean_curve, seed_panels
from dgpo_core.reporting.paper import paper_ablations, paper_arcap, paper_exact_match
from dgpo_core.reporting.reproduction.claims import CLAIMS
from dgpo_core.reporting.reproduction.report import pool_seeds
from tests.dgpo_core.reporting.reproduction.synthetic import MODELS, Runs, coin, curve, make_runs
from tests.dgpo_core.reporting.synthetic import MIRRORS

FILES = ["index.html", "results.md", "tables.json", "verdicts.json"]
LEVELS = {"student": 0.02, "teacher": 0.8, "kd": 0.3, "dgpo": 0.75, "ppo": 0.1}
EM: list[float | None] = [0.2 + 0.01 * step for step in range(30)]


def made(folder: Path, models: list[str] = MODELS, seeds: tuple[int, ...] = (0, 3)) -> Runs:
    runs = make_runs(folder, list(seeds), models, coin(LEVELS), coin(LEVELS))
    for seed in seeds:
        dev = [0.3 if step % 10 == 9 else None for step in range(30)]
        runs.curves[seed, "reinforce-dgpo"] = curve({"em": EM, "dev_em": dev, "kl_inside": EM})
        sixteen: list[float | None] = [16.0] * 30
        runs.curves[seed, "distill-kd"] = curve(
            {"episodes": sixteen, "loss": EM, "divergence": EM, "dev_em": dev}
        )
    return runs


def load(out: Path, name: str) -> Any:
    return json.loads((out / name).read_text(encoding="utf-8"))


def page_of(out: Path) -> tuple[str, Any]:
    """The page, and the data in it."""
    html = (out / "index.html").read_text(encoding="utf-8")
    return html, json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)[0])


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return made(tmp_path / "runs")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, Path]:
    """Runs and the folder of their reproduction; read only."""
    folder = tmp_path_factory.mktemp("written")
    runs = made(folder, [*MODELS, "ppo"])
    return runs, runs.write(folder / "out", starts={"kd": "student", "dgpo": "kd"})


def test_tables_hold_the_means_by_hand(written: tuple[Runs, Path]) -> None:
    runs, out = written
    found = load(out, "tables.json")
    for model in runs.models:
        own = [[row["em"] for row in runs.rows[seed, model]] for seed in runs.seeds]
        cell = found["exact_match"][model]["average"]
        assert cell["mean"] == pytest.approx(np.mean(own), abs=1e-6)
        assert list(cell["seeds"].values()) == pytest.approx(np.mean(own, axis=1), abs=1e-6)
        assert cell["ci95"][0] <= cell["mean"] <= cell["ci95"][1]
        assert cell["paper"] == paper_exact_match()[model]["avg"]
        name = "query_hit_nq"
        hits = [r["value"] for s in runs.seeds for r in runs.arcap[s, model] if r["measurement"] == name]
        assert found["arcap"][model][name]["mean"] == pytest.approx(np.mean(hits), abs=1e-6)
        assert found["arcap"][model][name]["paper"] == paper_arcap()[model][name]
    assert list(found["exact_match"]["kd"]) == [*MIRRORS, "average"]


def test_ablations_and_other_pairs_say_what_was_not_run(written: tuple[Runs, Path]) -> None:
    _, out = written
    found = load(out, "tables.json")
    assert [row["recipe"] for row in found["ablations"]] == [row["recipe"] for row in paper_ablations()]
    assert [row["recipe"] for row in found["ablations"] if row["exact_match"]] == ["dgpo"]
    assert {row["pair"] for row in found["model_pairs"] if row["ours"]} == {"qwen2.5-3b-to-0.5b"}
    assert len(found["model_pairs"]) == 15
    assert found["stability"]["dgpo"]["seeds"]["3"]["state"] == "stable"
    assert found["stability"]["ppo"]["seeds"] is None
    assert found["stability"]["ppo"]["paper"]["training"] == "collapses"
    text = (out / "results.md").read_text(encoding="utf-8")
    assert "not run" in text
    start = "| DGPO | DGPO: Tab. 6 | KD | PPO | selective |"
    (own,) = [line for line in text.splitlines() if line.startswith(start)]
    assert own.endswith("|  |"), "DGPO is compared with itself"


def test_verdicts_for_what_was_run_and_what_was_not(written: tuple[Runs, Path]) -> None:
    _, out = written
    verdicts = {row["claim"]: row for row in load(out, "verdicts.json")}
    assert list(verdicts) == [claim.name for claim in CLAIMS]
    assert verdicts["dgpo_over_kd"]["verdict"] == "reproduced at our scale"
    assert verdicts["dgpo_over_taid"]["verdict"] == "not tested"
    assert "TAID" in verdicts["dgpo_over_taid"]["evidence"]
    assert verdicts["dgpo_best_average"]["verdict"] == "not tested"
    assert verdicts["query_ppo_best"]["verdict"] == "not reproduced"
    assert verdicts["dgpo_stable"]["verdict"] == "reproduced at our scale"
    assert verdicts["ppo_collapses"]["verdict"] == "not tested"


def test_only_given_models_leave_every_claim_about_recipes_open(tmp_path: Path) -> None:
    out = made(tmp_path / "runs", ["student", "teacher"]).write(tmp_path / "out")
    tested = [row["claim"] for row in load(out, "verdicts.json") if row["verdict"] != "not tested"]
    assert set(tested) <= {"student_near_zero", "thinking_hurts_musique", "thinking_hurts_teacher"}


def test_same_inputs_give_the_same_bytes_whatever_their_order(tmp_path: Path) -> None:
    first, second = made(tmp_path / "one"), made(tmp_path / "two")
    second.seeds.reverse()
    for rows in [*second.rows.values(), *second.arcap.values()]:
        random.Random(3).shuffle(rows)
    outs = [first.write(tmp_path / "out1"), second.write(tmp_path / "out2")]
    assert sorted(path.name for path in outs[0].iterdir()) == FILES
    for name in FILES:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


def test_page_needs_no_network_and_draws_every_panel(written: tuple[Runs, Path]) -> None:
    html, data = page_of(written[1])
    assert "default-src 'none'" in html
    assert not re.findall(r"<(?:link|img|iframe)\b|<script[^>]+src=", html.partition("<script>")[0])
    places = re.findall(r'class="chart[^"]*" id="([^"]+)"', html)
    assert places == list(data["charts"])
    # em, dev_em, kl_inside: not the divergence on the teacher's episodes
    assert places == ["power-kd", "budget-episodes", "curve-0", "curve-1", "curve-2"]
    [kd] = data["charts"]["budget-episodes"]["traces"]  # DGPO's episodes are not known
    assert (kd["x"], kd["y"]) == ([160, 320, 480], [0.3, 0.3, 0.3])
    roles = [trace["role"] for trace in data["charts"]["curve-0"]["traces"]]
    assert roles == ["raw", "raw", "trend"]
    assert data["figures"] == ["dgpo"]


def test_panels_of_on_policy_distillation_and_of_the_gate() -> None:
    sampled: Points = [(1, 0.2), (2, 0.4)]
    columns = {
        "gkd": ("em", "invalid_actions", "entropy", "divergence"),
        "dgpo": ("em", "gate_open", "gate_closed", "gate_excluded"),
    }
    curves = {name: [Curve("", name, dict.fromkeys(own, sampled))] for name, own in columns.items()}
    drawn = {panel["title"]: {trace["model"] for trace in panel["traces"]} for panel in seed_panels(curves)}
    assert drawn == {
        "Exact match": {"gkd", "dgpo"},
        "Invalid actions": {"gkd"},
        "Entropy of the policy": {"gkd"},
        "Divergence from the teacher": {"gkd"},
        "Gate open": {"dgpo"},
        "Gate closed": {"dgpo"},
        "Excluded from the gate": {"dgpo"},
    }


def test_recipes_of_ones_own_have_their_place(tmp_path: Path) -> None:
    levels = coin(LEVELS | {"grpo": 0.1, "mine": 0.2, "yours": 0.3})
    runs = make_runs(tmp_path / "runs", [0], [*MODELS, "grpo", "mine", "yours"], levels, levels)
    for name in ("grpo", "mine"):
        runs.curves[0, f"reinforce-{name}"] = curve({"em": EM})
    out = runs.write(tmp_path / "out")
    assert {"grpo", "mine", "yours"} <= set(load(out, "tables.json")["exact_match"])
    _, data = page_of(out)
    assert len({model["colour"] for model in data["models"]}) == len(data["models"])
    assert data["figures"] == ["grpo"]


def test_single_seed_is_called_one(tmp_path: Path) -> None:
    out = made(tmp_path / "runs", seeds=(7,)).write(tmp_path / "out")
    assert "one seed (7): nothing is said of others" in (out / "results.md").read_text(encoding="utf-8")
    assert load(out, "tables.json")["exact_match"]["kd"]["average"]["seed_sd"] is None


def test_mean_curve_over_the_seeds_that_have_the_step() -> None:
    assert mean_curve([[(1, 0.2), (2, 0.4)], [(1, 0.4)]]) == [(1, pytest.approx(0.3)), (2, 0.4)]


def drop_question(runs: Runs) -> None:
    for model in runs.models:  # the models of a seed must agree: otherwise that is what is reported
        runs.rows[3, model].pop()


def drop_measured(runs: Runs) -> None:
    for model in runs.models:
        runs.arcap[3, model].pop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_question, "seed 3: .*student/questions.parquet: not the questions that seed 0"),
        (lambda runs: runs.rows[3, "kd"].pop(), "seed 3: .*kd/questions.parquet"),
        (lambda runs: runs.arcap[0, "kd"].pop(), "seed 0: .*kd/arcap.parquet: .*not the questions"),
        (drop_measured, "seed 3: .*student/arcap.parquet: not the measurements and questions of student of"),
        (lambda runs: runs.curves.pop((3, "reinforce-dgpo")), "seed 3: .*plots: no curve of dgpo"),
        (lambda runs: runs.curves.update({(3, "reinforce-dgpo"): "em\n1\n"}), "seed 3: .*a column step"),
    ],
)
def test_malformed_or_different_seeds_are_refused_and_nothing_is_written(
    runs: Runs, tmp_path: Path, spoil: Callable[[Runs], object], message: str
) -> None:
    spoil(runs)
    with pytest.raises(UserError, match=message):
        runs.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["evaluation/kd/questions.parquet", "evaluation/dgpo/arcap.parquet", "plots"]
)
def test_missing_file_is_named_with_its_seed(runs: Runs, tmp_path: Path, name: str) -> None:
    runs.write(tmp_path / "before")
    path = runs.roots[3] / name
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(UserError, match=f"seed 3: {re.escape(str(path))}"):
        pool_seeds(runs.roots.values(), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": []}, "no model is in all"),
        ({"mirrors": {"average": "nq"}}, "average"),
        ({"pair": "gpt"}, "no pair 'gpt'"),
    ],
)
def test_impossible_records_are_refused(
    runs: Runs, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        runs.write(tmp_path / "out", **options)


def test_all_measurements_have_a_place(written: tuple[Runs, Path]) -> None:
    assert set(load(written[1], "tables.json")["arcap"]["kd"]) == set(MEASUREMENTS)


def test_power_is_told_of_dgpo_against_every_trained_recipe(written: tuple[Runs, Path]) -> None:
    runs, out = written
    rows = load(out, "tables.json")["power"]
    assert [row["recipe"] for row in rows] == ["kd", "ppo"]
    for row in rows:
        other = row["recipe"]
        ours, theirs = (
            np.array([[r["em"] for r in runs.rows[s, model]] for s in runs.seeds]).mean(axis=1)
            for model in ("dgpo", other)
        )
        low, high = stats.ttest_1samp(ours - theirs, 0.0).confidence_interval()
        assert row["difference"]["seeds_ci95"] == pytest.approx([low, high], abs=1e-5)
    html, data = page_of(out)
    assert "Westfall" in html and "over seeds" in html
    assert data["charts"]["power-kd"]["traces"][0]["name"] == "3 seeds"
    assert "power-ppo" not in data["charts"]


def test_one_seed_has_no_interval_over_seeds_and_no_power(tmp_path: Path) -> None:
    out = made(tmp_path / "runs", seeds=(4,)).write(tmp_path / "out")
    found = load(out, "tables.json")
    assert found["power"] == [] and found["exact_match"]["kd"]["average"]["seeds_ci95"] == [None, None]
    assert 'id="power"' not in page_of(out)[0]
    assert "over seeds" not in (out / "results.md").read_text()
