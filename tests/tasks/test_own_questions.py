"""Questions of one's own through the stages: a set of any name and form, without gold passages or a role."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from dgpo_core.config.params import overlay, resolve_profile
from dgpo_core.datasets.records import read_questions
from dgpo_core.errors import UserError
from tasks.stages.audit import audit
from tasks.stages.data import generate
from tasks.stages.index import index
from tests.conftest import ROOT
from tests.tasks.miniature import change_params

TOWNS = 20


def use_own_files(folder: Path, count: int = TOWNS) -> None:
    """Write documents, a spreadsheet of questions as Excel saves it, and settings that name both."""
    with (folder / "corpus.jsonl").open("w") as file:
        for n in range(TOWNS):
            text = f"Town {n} lies on the river Aro{n}. Its mayor is Person{n}."
            file.write(json.dumps({"id": n, "title": f"Town {n}", "text": text}) + "\n")
    with (folder / "questions.csv").open("w", encoding="utf-8-sig", newline="") as file:
        rows = [(f"Who is the mayor of town {n}?", f"Person{n}") for n in range(count)]
        csv.writer(file, delimiter=";").writerows([("Question", "Answer"), *rows])
    own = {
        "data": {
            "source": "files",
            "files": {"corpus": ["corpus.jsonl"], "questions": {"towns": {"all": ["*.csv"]}}},
        },
        "questions": {"train": ["towns"], "test": {}},
    }
    params = overlay(resolve_profile(ROOT / "profiles/tiny.yaml"), own)
    params["questions"]["test"] = {"towns": None}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def test_a_spreadsheet_becomes_splits(workplace: Path) -> None:
    use_own_files(workplace)
    generate()
    metrics = json.loads(Path("metrics/data.json").read_text())
    assert (metrics["towns_train"], metrics["towns_dev"], metrics["towns_test"]) == (14, 2, 4)
    splits = [
        read_questions(Path(f"data/questions/towns/{split}.jsonl")) for split in ("train", "dev", "test")
    ]
    assert {q.question: q.golden_answers for own in splits for q in own} == {
        f"Who is the mayor of town {n}?": (f"Person{n}",) for n in range(TOWNS)
    }


def test_a_set_that_no_file_is_named_for_is_refused(workplace: Path) -> None:
    use_own_files(workplace)
    change_params(questions={"train": ["towns", "cities"]})
    with pytest.raises(UserError, match=r"questions\.train: \['cities'\] are not in data\.files\.questions"):
        generate()


def test_the_data_report_says_what_a_set_is_worth_and_stops_what_is_broken(workplace: Path) -> None:
    """Of 20 questions the corpus answers all; then the questions are about another one's towns."""
    use_own_files(workplace)
    (workplace / "models").mkdir()
    (workplace / "models/student").symlink_to(ROOT / "models/student")
    generate()
    index()
    audit()
    metrics = json.loads(Path("metrics/audit.json").read_text())
    assert metrics["passages"] == TOWNS and metrics["towns_test_questions"] == 4
    assert metrics["towns_train_answerable"] == metrics["towns_test_in_top_k"] == 1.0
    assert metrics["towns_test_in_train"] == 0 and "towns_test_in_gold" not in metrics
    assert Path("data/audit/passed").is_file()
    assert "| towns | test | 4 | 1.000 |" in Path("data/audit/summary.md").read_text()
    text = Path("questions.csv").read_text(encoding="utf-8-sig").replace("Person", "Nobody")
    Path("questions.csv").write_text(text)
    generate()
    with pytest.raises(
        UserError, match=r"towns/train: a passage has an answer to 0\.0% of 14 questions"
    ) as error:
        audit()
    page = str(error.value).rpartition("all figures: ")[2]
    assert "The data stop the pipeline: 3 figures" in Path(page).read_text()
    change_params(audit={"min_answerable": 0.0})
    audit()
    assert json.loads(Path("metrics/audit.json").read_text())["towns_test_answerable"] == 0.0
