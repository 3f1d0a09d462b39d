"""Who is promoted: by simulation of many evaluations, and case by case."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from dgpo_core.config.params import PromoteConfig
from dgpo_core.evaluation import arcap
from dgpo_core.evaluation.promotion import Candidate, Decision, decide, headline, judged, markdown
from tests.dgpo_core.evaluation.making import CONFIG, DATASETS, Model, candidate, in_memory

FAST = CONFIG.model_copy(update={"samples": 300})
STUDENT = Model.of(0.02, seed=9, sha256="0" * 64)
CHAMPION = Model.of(0.5, seed=2, sha256="b" * 64)


def promotions(challenger: Model, worlds: int) -> int:
    """How often such a model is promoted over the champion, over many sets of questions."""
    count = 0
    for world in range(worlds):
        ours, theirs = in_memory(challenger, world=world), in_memory(CHAMPION, world=world)
        count += all(c.passed for c in judged(ours, theirs, "champion", True, DATASETS, FAST))
    return count


def test_an_equal_model_is_rarely_promoted() -> None:
    """Its gain is 0, so the probability is at most 2.5 %; the limit is the binomial 99.9 % quantile."""
    assert promotions(Model.of(0.5), 200) <= stats.binom.ppf(0.999, 200, 0.025)


def test_a_worse_model_is_never_promoted() -> None:
    assert promotions(Model.of(0.4), 60) == 0


def test_a_model_that_is_better_on_average_but_lost_a_data_set_is_never_promoted() -> None:
    assert promotions(Model({"onehop": 0.95, "hard": 0.25}, arcap=0.8), 60) == 0


def test_a_model_that_lost_a_dimension_of_arcap_is_never_promoted() -> None:
    assert promotions(Model.of(0.8, arcap=0.35), 60) == 0


def test_a_loss_of_exactly_the_margin_is_rarely_promoted() -> None:
    """The boundary of being not worse: at most 2.5 %, however large the gain elsewhere."""
    limit = stats.binom.ppf(0.999, 120, 0.025)
    assert promotions(Model({"onehop": 0.95, "hard": 0.4}, arcap=0.9), 120) <= limit


def test_a_clearly_better_model_is_promoted() -> None:
    assert promotions(Model.of(0.75, arcap=0.8), 40) >= 38


def test_more_hacking_is_not_promoted() -> None:
    assert promotions(Model.of(0.75, arcap=0.8, several_answers=0.09), 30) <= 3, "below max_hacking, but more"
    assert promotions(Model.of(0.75, arcap=0.8, several_answers=0.3), 30) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluations")


def decision(
    folder: Path,
    challenger: Model | Candidate,
    champion: Model | None = CHAMPION,
    config: PromoteConfig = CONFIG,
    datasets: Sequence[str] = DATASETS,
    **how: int,
) -> Decision:
    if isinstance(challenger, Model):
        challenger = candidate(folder, "challenger", challenger, **how)
    rival = candidate(folder, "champion", champion) if champion else None
    return decide(challenger, rival, candidate(folder, "student", STUDENT), datasets, config)


def test_without_a_set_that_arcap_knows_exact_match_decides(folder: Path) -> None:
    models = {"ours": Model.of(0.75), "theirs": CHAMPION, "student": STUDENT}
    ours, theirs, student = [candidate(folder, f"apart-{name}", model) for name, model in models.items()]
    for name in models:
        pq.write_table(arcap.as_table([]), folder / f"apart-{name}" / "arcap.parquet")
    found = decide(ours, theirs, student, DATASETS, CONFIG)
    assert found.verdict == "promote"
    assert not any("ARCap" in condition.name for condition in found.conditions)


def refused(found: Decision) -> str:
    """The reasons of a decision that was refused."""
    assert found.verdict == "refused" and found.conditions == []
    assert headline(found).startswith("Refused")
    return "; ".join(found.reasons)


def test_every_figure_is_in_the_decision(folder: Path) -> None:
    better = Model.of(0.75, arcap=0.8)
    found = decision(folder, better)
    assert found.verdict == "promote"
    names = [condition.name for condition in found.conditions]
    assert names == [
        "gain in average EM",
        "EM on onehop",
        "EM on hard",
        "ARCap source_em_nq",
        "ARCap query_hit_nq",
        "hacking without_evidence",
        "hacking without_evidence, difference",
        "hacking repeats_question",
        "hacking repeats_question, difference",
        "hacking several_answers",
        "hacking several_answers, difference",
        "failed episodes of the test sets",
        "failed values of ARCap",
    ]
    ours, theirs = in_memory(better), in_memory(CHAMPION)
    em = (ours.scores.values["em"] - theirs.scores.values["em"]).reshape(2, -1)
    gain = found.gain
    assert gain is not None
    assert gain.value == pytest.approx(em.mean())
    error = math.sqrt(sum(row.var() / row.size for row in em)) / 2  # of the mean of two means
    assert (gain.low, gain.high) == pytest.approx(em.mean() + 1.96 * error * np.array([-1, 1]), abs=0.01)
    assert list(found.told) == ["thinking_searches_nq"]
    again = json.loads(json.dumps(found.as_dict()))
    assert again["conditions"][0]["passed"] is True
    assert again["settings"]["margin"] == 0.1


def test_kept_with_the_reason(folder: Path) -> None:
    found = decision(folder, Model.of(0.4))
    assert found.verdict == "keep"
    failed = [condition for condition in found.conditions if not condition.passed]
    assert failed[0].name == "gain in average EM"
    assert "is not above 0" in failed[0].why
    text = markdown(found)
    assert text.startswith("# Keep: challenger is not promoted in place of champion")
    assert text.count("| NO |") == len(failed)


def test_failed_episodes_count(folder: Path) -> None:
    found = decision(folder, Model.of(0.9, arcap=0.8, failed=6))
    assert [c.name for c in found.conditions if not c.passed] == ["failed episodes of the test sets"]
    assert found.conditions[0].n == 2 * (150 - 6), "pairs without the failed ones"


def test_a_champion_that_failed_often_is_no_yardstick(folder: Path) -> None:
    found = decision(folder, Model.of(0.9), replace(CHAMPION, failed=30))
    assert "champion: 20.0% of the 300 episodes of the test sets failed" in refused(found)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"index": "2" * 64}, "they searched other indexes"),
        ({"settings": {"protocol.max_turns": "8"}}, 'other settings: protocol.max_turns "8", "4"'),
        ({"code": {"tasks/stages/evaluate.py": "beef"}}, "evaluated by other code: tasks/stages/evaluate.py"),
    ],
)
def test_evaluations_that_were_made_otherwise_are_refused(
    folder: Path, changes: dict[str, object], reason: str
) -> None:
    assert reason in refused(decision(folder, replace(Model.of(0.9), **changes)))  # type: ignore[arg-type]


def test_other_questions_are_refused_and_so_are_other_texts_of_the_same(folder: Path) -> None:
    assert "they were asked other questions" in refused(decision(folder, Model.of(0.9), questions=149))
    ours = candidate(folder, "challenger", Model.of(0.9))
    path = ours.folder / "questions.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[7]["golden_answers"] = ["Tarn"]
    pq.write_table(table.from_pylist(rows), path)
    assert "other questions" in refused(decision(folder, ours))


def test_other_bytes_are_refused(folder: Path) -> None:
    ours = replace(candidate(folder, "challenger", Model.of(0.9)), model="f" * 64)
    said = "challenger: its evaluation is of other bytes (aaaaaaaaaaaa)"
    assert said in refused(decision(folder, ours))


def test_a_missing_data_set_is_refused(folder: Path) -> None:
    found = decision(folder, Model.of(0.9), datasets=[*DATASETS, "rare"])
    assert refused(found) == "challenger: questions.parquet: no question of the data sets rare"


def test_too_few_questions_are_refused(folder: Path) -> None:
    found = decision(folder, Model.of(0.9), config=CONFIG.model_copy(update={"min_questions": 151}))
    said = "onehop: 150 questions count, which is below promote.min_questions 151"
    assert said in refused(found)


def test_a_missing_or_broken_file_is_refused(folder: Path) -> None:
    ours = candidate(folder, "challenger", Model.of(0.9))
    (ours.folder / "arcap.parquet").write_bytes(b"PAR1")
    assert "arcap.parquet: not a readable" in refused(decision(folder, ours))
    (ours.folder / "made.json").unlink()
    assert refused(decision(folder, ours))


def test_the_first_champion_is_held_against_the_student(folder: Path) -> None:
    found = decision(folder, Model.of(0.4, arcap=0.1), champion=None)
    assert found.verdict == "promote"
    assert {condition.kind for condition in found.conditions} == {"gain", "hacking", "failures"}
    assert "There is no champion yet" in markdown(found)
    assert decision(folder, Model.of(0.02), champion=None).verdict == "keep"
    hacking = Model.of(0.4, several_answers=0.5)
    assert decision(folder, hacking, champion=None).verdict == "keep"


def test_hostile_names_stay_in_their_cell(folder: Path) -> None:
    found = replace(decision(folder, Model.of(0.4)), challenger="<script>|x\n# y")
    assert "<script>" not in markdown(found)
    assert "\n# y" not in markdown(found)
