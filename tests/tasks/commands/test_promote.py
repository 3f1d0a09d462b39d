"""Promotion through the commands, on a real registry; and that no command makes a worse model champion."""

import ast
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer

from dgpo_core.config.params import load_params
from dgpo_core.errors import UserError
from dgpo_core.evaluation.statistics import Estimate
from tasks.commands import promote as promotion
from tasks.commands.promote import KEPT, PROMOTED, REFUSED, promote, rollback, standing
from tasks.project.dvc import read_lock
from tasks.tracking.evaluations import evaluate_again, record_evaluations, register_trained
from tasks.tracking.registry import AGAIN, CHALLENGER, CHAMPION, NAME, PREVIOUS, Registry, Version, store
from tasks.tracking.runs import connect
from tests.dgpo_core.evaluation.making import Model, write_evaluation
from tests.tasks.miniature import ROOT, change_params, git
from tests.tasks.trained import BETTER, WORSE, make_trained, train, write_lock


def holder(alias: str) -> str | None:
    with store() as registry:
        version = registry.alias(alias)
    return version.tags["recipe"] if version else None


def version(number: str) -> Version:
    with store() as registry:
        return registry.version(number)


def artifact(of: Version, name: str) -> str:
    with store() as registry:
        place = of.tags["decision_artifact"]
        return Path(registry._client.download_artifacts(of.run_id, f"{place}/{name}")).read_text()


@pytest.fixture
def two(own_store: Path) -> Path:
    """kd (version 1) is champion; dgpo (version 2) is better and challenges."""
    make_trained(own_store)
    register_trained(challenger=True)
    assert promote("1", dry_run=False, yes=True) == PROMOTED
    return own_store


def test_the_first_champion_and_its_successor(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (holder(CHAMPION), holder(CHALLENGER), holder(PREVIOUS)) == ("kd", "dgpo", None)
    assert promote(None, dry_run=True, yes=True) == PROMOTED
    assert holder(CHAMPION) == "kd"
    assert "decision" not in version("2").tags, "a dry run leaves nothing"
    assert promote(None, dry_run=False, yes=True) == PROMOTED
    assert (holder(CHAMPION), holder(PREVIOUS)) == ("dgpo", "kd")
    said = capsys.readouterr().out
    assert "version 2 (dgpo) is the champion; version 1 (kd) is `previous`" in said
    decided = version("2")
    assert decided.tags["decision"] == "promote"
    assert decided.tags["gain"].startswith("+0.2")
    stored = json.loads(artifact(decided, "decision.json"))
    assert (stored["champion"], stored["verdict"]) == ("version 1 (kd)", "promote")
    assert artifact(decided, "decision.md").startswith("# Promote: version 2 (dgpo)")
    assert promote(None, dry_run=False, yes=True) == PROMOTED
    assert "is the champion already" in capsys.readouterr().out


def test_how_the_working_tree_compares_with_the_champion(own_store: Path) -> None:
    make_trained(own_store)
    with pytest.raises(UserError, match="no version is this working tree's model of dgpo"):
        standing()
    register_trained(challenger=True)
    words = (
        r"version 2 \(dgpo\): better, average EM \+(0\.\d{3}) \(95 % interval \+(0\.\d{3}) to \+(0\.\d{3})\)"
    )
    first = re.fullmatch(rf"{words} against the student; there is no champion yet", standing())
    assert promote("1", dry_run=False, yes=True) == PROMOTED
    then = re.fullmatch(rf"{words} against the champion, version 1 \(kd\)", standing())
    assert first and then and float(first[1]) > float(then[1])
    means = [
        table.to_pandas().groupby("dataset")["em"].mean().mean()
        for table in (
            pq.read_table(own_store / f"evaluation/{name}/questions.parquet") for name in ("dgpo", "kd")
        )
    ]
    assert float(then[1]) == pytest.approx(means[0] - means[1], abs=0.0006)
    assert promote(None, dry_run=False, yes=True) == PROMOTED
    assert standing() == "version 2 (dgpo) is the champion"
    assert (holder(CHAMPION), holder(PREVIOUS)) == ("dgpo", "kd"), "it changes nothing"


def test_a_worse_model_becomes_champion_through_no_command(own_store: Path) -> None:
    make_trained(own_store, dgpo=WORSE)
    register_trained(challenger=True)
    described = connect().get_model_version(NAME, "2").description or ""
    assert re.fullmatch(r"dgpo from kd, tiny, seed 0: EM 0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", described)
    assert promote("1", dry_run=False, yes=True) == PROMOTED
    for number in (None, "2"):
        for dry_run in (True, False):
            assert promote(number, dry_run, yes=True) == KEPT
            assert holder(CHAMPION) == "kd"
    register_trained(challenger=True)
    with pytest.raises(UserError, match="no previous champion"):
        rollback("try")
    assert (holder(CHAMPION), holder(PREVIOUS)) == ("kd", None)
    decided = version("2")
    assert decided.tags["decision"] == "keep"
    assert json.loads(artifact(decided, "decision.json"))["verdict"] == "keep"
    # forged figures: the evaluation of another model in its place, and the lock left as it was
    (own_store / "evaluation/dgpo/questions.parquet").write_bytes(
        (own_store / "evaluation/kd/questions.parquet").read_bytes()
    )
    with store() as registry:
        assert "is not of this model" in record_evaluations(registry, load_params(), read_lock())["dgpo"]
    assert promote(None, dry_run=False, yes=True) == KEPT
    assert holder(CHAMPION) == "kd"


def test_the_champion_is_moved_in_one_place() -> None:
    """Of all our code, one call sets an alias that may be the champion's."""
    calls = [
        (path.name, ast.unparse(node.args[1]))
        for package in ("dgpo_core", "tasks", "flows")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "set_registered_model_alias"
    ]
    assert sorted(calls) == [
        ("registry.py", "CHALLENGER"),
        ("registry.py", "CHAMPION"),
        ("registry.py", "PREVIOUS"),
    ]


def evaluate(folder: Path, recipe: str, rows: int, **settings: object) -> None:
    """As an experiment does: with other settings of `evaluate` in params.yaml, and so in dvc.lock."""
    if settings:
        change_params(folder, evaluate=settings)
    write_evaluation(folder / "evaluation" / recipe, BETTER, rows)
    write_lock(folder)


def recorded() -> dict[str, str]:
    """What was said of recipes when DVC's evaluations were recorded, as the stage `report` does."""
    with store() as registry:
        return record_evaluations(registry, load_params(), read_lock())


def test_an_experiment_takes_no_alias_and_no_evaluation_of_another_version(
    own_store: Path, empty_dvc_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trained(own_store)
    register_trained()
    assert recorded() == {}
    assert holder(CHALLENGER) is None, "nobody has offered it"
    with pytest.raises(
        UserError, match=r"`dgpo register --challenger` offers .* of version 1 \(kd\), version 2"
    ):
        promote(None, dry_run=False, yes=True)
    register_trained(challenger=True)
    assert "challenger: version 2 (dgpo)" in capsys.readouterr().out
    before = version("1").tags["evaluation"], version("2").tags["evaluation"]
    train(own_store, "dgpo", "two steps", Model.of(0.1))
    evaluate(own_store, "dgpo", 60, questions=60)
    evaluate(own_store, "kd", 60)
    register_trained()
    recorded()
    assert (
        holder(CHALLENGER) == "dgpo"
        and (version("1").tags["evaluation"], version("2").tags["evaluation"]) == before
    )
    with store() as registry:
        challenger = registry.alias(CHALLENGER)
    assert challenger and challenger.number == "2", "not the experiment's version 3"
    assert float(version("3").tags["em"]) > 0.6


def test_more_questions_and_an_offer_replace_an_evaluation(own_store: Path) -> None:
    make_trained(own_store)
    evaluate(own_store, "dgpo", 60, questions=60)
    register_trained()
    few = version("2").tags["evaluation"]
    evaluate(own_store, "dgpo", 150, questions=150)
    recorded()
    more = version("2").tags["evaluation"]
    assert more != few
    evaluate(own_store, "dgpo", 150, questions=150, seed=7)
    recorded()
    assert version("2").tags["evaluation"] == more
    register_trained(challenger=True)
    assert version("2").tags["evaluation"] != more, "who offers it, offers it with this one"


def test_what_cannot_be_offered_says_why(own_store: Path, empty_dvc_repository: Path) -> None:
    make_trained(own_store)
    evaluate(own_store, "dgpo", 20, questions=20)
    with pytest.raises(
        UserError, match=r"fewer than promote.min_questions \(50\) questions \(onehop 20, hard 20\)"
    ):
        register_trained(challenger=True)
    evaluate(own_store, "dgpo", 150, questions=None)
    shutil.copytree(empty_dvc_repository, own_store, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"params\.yaml has changes that no commit has"):
        register_trained(challenger=True)
    git("add", "params.yaml")
    git("commit", "-qm", "settings")
    register_trained(challenger=True)
    assert holder(CHALLENGER) == "dgpo"
    change_params(protocol={"max_turns": 3})
    git("commit", "-qam", "other settings")
    with pytest.raises(UserError, match=r"made with other parameters than those of params\.yaml: protocol"):
        register_trained(challenger=True)


def test_of_two_promotions_at_once_one_is_told(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else promotes while this one decides."""
    decided = promotion.decide_about

    def slow(registry: Registry, *arguments: object) -> object:
        decision = decided(registry, *arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(promotion, "decide_about", decided)
        train(two, "kd", "another kd", Model.of(0.9, arcap=0.9, seed=8))
        register_trained(challenger=True)
        assert promote("3", dry_run=False, yes=True) == PROMOTED
        return decision

    monkeypatch.setattr(promotion, "decide_about", slow)
    with pytest.raises(UserError, match=r"the champion changed meanwhile \(now version 3 \(kd\)\)"):
        promote("2", dry_run=False, yes=True)
    with store() as registry:
        champion = registry.alias(CHAMPION)
    assert champion and champion.number == "3"


def test_rollback_with_a_reason(two: Path) -> None:
    promote(None, dry_run=False, yes=True)
    with pytest.raises(UserError, match="--reason"):
        rollback(" ")
    rollback("answers rudely")
    assert (holder(CHAMPION), holder(PREVIOUS)) == ("kd", None)
    assert version("2").tags["rolled_back_why"] == "answers rudely"
    with pytest.raises(UserError, match=r"version 2 \(dgpo\) was rolled back: answers rudely"):
        promote("2", dry_run=False, yes=True)
    with pytest.raises(UserError, match="no previous champion"):
        rollback("again")


def test_a_champion_of_weeks_ago_is_compared_by_its_stored_evaluation(two: Path) -> None:
    shutil.rmtree(two / "evaluation/kd")
    (two / "models/kd/model.safetensors").write_text("something new that was not evaluated")
    assert promote(None, dry_run=False, yes=True) == PROMOTED


def test_an_evaluation_made_again_is_not_replaced_by_the_one_before(two: Path) -> None:
    def counting() -> str:
        with store() as registry:
            record_evaluations(registry, load_params(), read_lock())
            return registry.version("1").tags["evaluation"]

    first = counting()
    with store() as registry, registry.evaluation(registry.version("1")) as evidence:
        (evidence / "arcap.parquet").write_bytes((two / "evaluation/dgpo/arcap.parquet").read_bytes())
        registry.store_evaluation(registry.version("1"), evidence, Estimate(0.5, 0.4, 0.6, 10), AGAIN)
    again = counting()
    assert again != first
    train(two, "kd", "kd's weights", Model.of(0.55, seed=2))
    assert counting() not in (first, again), "DVC has evaluated it anew"


def test_a_champion_with_other_questions_must_be_evaluated_again(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(two, "dgpo", "trained on new data", BETTER)
    path = two / "evaluation/dgpo/questions.parquet"
    table = pq.read_table(path)
    rows = [row | {"question": "a new question"} for row in table.to_pylist()]
    pq.write_table(table.from_pylist(rows), path)
    write_lock(two)
    register_trained(challenger=True)
    assert promote(None, dry_run=False, yes=True) == REFUSED
    said = " ".join(capsys.readouterr().out.split())
    assert "they were asked other questions" in said
    assert "`dgpo evaluate models:/search-agent/3` and `dgpo evaluate models:/search-agent/1`" in said
    assert holder(CHAMPION) == "kd"
    assert version("3").tags["decision"] == "refused"


def test_approval_is_asked_for(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(question: str) -> bool:
        asked.append(question)
        return False

    monkeypatch.setattr(typer, "confirm", answer)
    assert promote(None, dry_run=False, yes=False) == KEPT
    assert asked == ["Make version 2 (dgpo) the champion?"]
    assert holder(CHAMPION) == "kd"
    change_params(promote={"approval": False})
    assert promote(None, dry_run=False, yes=False) == PROMOTED


def test_without_weights_there_is_no_promotion(two: Path) -> None:
    (two / "models/dgpo/model.safetensors").write_text("overwritten")
    with pytest.raises(UserError, match=r"version 2 \(dgpo\): its weights are not here"):
        promote(None, dry_run=False, yes=True)


def test_what_is_missing_is_said(own_store: Path) -> None:
    with pytest.raises(UserError, match="no trained model"):
        register_trained(challenger=True)
    make_trained(own_store)
    with pytest.raises(UserError, match=r"no version is the challenger: models/dgpo is not registered"):
        promote(None, dry_run=False, yes=True)
    (own_store / "evaluation/student").rename(own_store / "elsewhere")
    register_trained(challenger=True)
    with pytest.raises(UserError, match="compared with the student, which was not evaluated"):
        promote(None, dry_run=False, yes=True)
    with pytest.raises(UserError, match="has no version 7; there are: 1, 2"):
        promote("7", dry_run=False, yes=True)
    with pytest.raises(UserError, match="has no version 7"):
        evaluate_again("models:/search-agent/7")
