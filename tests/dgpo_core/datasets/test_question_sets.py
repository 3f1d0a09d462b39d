"""Your own sets: which files they need, and splits that are made from a seed."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.config.data import QuestionFilesConfig, QuestionSetsConfig
from dgpo_core.datasets.question_sets import find_question_files, load_question_sets, split_questions
from dgpo_core.datasets.records import Question
from dgpo_core.errors import UserError

SHARES = {"dev": 0.1, "test": 0.2}


def write(path: Path, count: int, word: str = "town") -> str:
    path.parent.mkdir(exist_ok=True)
    rows = [{"question": f"Who leads {word} {n}?", "answer": f"Person {n % 7}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(
    sets: dict[str, QuestionFilesConfig], train: list[str], test: list[str]
) -> dict[tuple[str, str], list[Question]]:
    wanted = QuestionSetsConfig(train=train, test=dict.fromkeys(test))
    return load_question_sets(sets, wanted, find_question_files(sets, wanted))[0]


def sizes(splits: dict[tuple[str, str], list[Question]]) -> dict[tuple[str, str], int]:
    return {key: len(own) for key, own in splits.items()}


def test_one_list_or_files_of_splits_under_any_name(tmp_path: Path) -> None:
    """Patterns name several files; what no setting trains on has its test questions alone."""
    sets = {
        "mine": QuestionFilesConfig(all=[write(tmp_path / "a" / "q.jsonl", 30)]),
        "yours": QuestionFilesConfig(
            train=[write(tmp_path / "b1.jsonl", 20), write(tmp_path / "b2.jsonl", 10, "hill")],
            test=[str(tmp_path / "a" / "*.jsonl")],
        ),
        "other": QuestionFilesConfig(
            train=[str(tmp_path / "nowhere")],
            dev=[write(tmp_path / "d.jsonl", 3)],
            test=[str(tmp_path / "a")],
        ),
    }
    found = load(sets, ["mine", "yours"], ["mine", "yours"])
    assert sizes(found) == {
        ("mine", "train"): 21, ("mine", "dev"): 3, ("mine", "test"): 6,
        ("yours", "train"): 27, ("yours", "dev"): 3, ("yours", "test"): 30,
    }  # fmt: skip
    asked = [question.question for (name, _), own in found.items() for question in own if name == "mine"]
    assert sorted(asked) == sorted(f"Who leads town {n}?" for n in range(30))
    sets["other"] = sets["other"].model_copy(update={"train": [str(tmp_path / "b1.jsonl")]})
    found = load(sets, ["other"], ["mine"])
    assert sizes(found) == {("other", "train"): 20, ("other", "dev"): 3, ("mine", "test"): 6}


def test_what_a_set_lacks_is_said(tmp_path: Path) -> None:
    only_train = {"mine": QuestionFilesConfig(train=[write(tmp_path / "q.jsonl", 3)])}
    with pytest.raises(
        UserError, match=r"data\.files\.questions\.mine: questions\.test names it, but it has no"
    ):
        load(only_train, ["mine"], ["mine"])
    with pytest.raises(UserError, match=r"data\.files\.questions\.mine\.all: .*x\*\.csv: no such file"):
        load({"mine": QuestionFilesConfig(all=[str(tmp_path / "x*.csv")])}, ["mine"], ["mine"])
    with pytest.raises(UserError, match="3 questions in 3 groups that must stay together: too few"):
        split_questions("mine", asked([(str(n), "x") for n in range(3)]), {"a": 0.5, "b": 0.5}, 0, "question")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name its files: train, dev and test, or all"),
        ({"all": ["a"], "test": ["b"]}, "all: is split here"),
        ({"all": ["a"], "split": {"dev": 0.5, "test": 0.5}}, "together below 1"),
        ({"all": ["a"], "columns": {"answer": "a"}}, "Input should be 'id', 'question' or 'answers'"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QuestionFilesConfig.model_validate(settings)


def asked(rows: list[tuple[str, str]]) -> list[Question]:
    return [Question(str(n), text, tuple(answers.split())) for n, (text, answers) in enumerate(rows)]


TEXTS = st.tuples(
    st.sampled_from(["Town", "hill", "Sea"]), st.integers(0, 30), st.sampled_from(["", "?", " !"])
)
ROWS = st.lists(
    st.tuples(
        TEXTS.map(lambda t: f"{t[0]} {t[1]}{t[2]}"), st.sampled_from(["yes", "a b", "The b c", "d e", "f"])
    ),
    min_size=1,
    max_size=60,
)


@given(ROWS, st.sampled_from(["question", "answer"]), st.integers(0, 3))
def test_splits_are_disjoint_and_whole_and_do_not_depend_on_the_order(
    rows: list[tuple[str, str]], disjoint: str, seed: int
) -> None:
    questions = asked(rows)
    try:
        found = split_questions("mine", questions, SHARES, seed, disjoint)
    except UserError:
        return
    assert Counter(q.id for own in found.values() for q in own) == Counter(q.id for q in questions)
    assert all(found.values())
    assert len(found["test"]) <= max(1, round(0.2 * len(rows)))
    keys = [{re.sub(r"\W", "", q.question.lower()) for q in own} for own in found.values()]
    if (
        disjoint == "answer"
    ):  # by hand: normalised, "a" is nothing, "The" beside b none, and yes names nothing
        golden = [{a for q in own for a in q.golden_answers} - {"yes", "a", "The"} for own in found.values()]
        assert not (golden[0] & golden[1] or golden[0] & golden[2] or golden[1] & golden[2])
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    again = split_questions("mine", questions[::-1], SHARES, seed, disjoint)
    assert {split: {q.id for q in own} for split, own in again.items()} == {
        split: {q.id for q in own} for split, own in found.items()
    }


def test_another_seed_splits_otherwise() -> None:
    questions = asked([(f"town {n}", f"x{n}") for n in range(40)])
    first, same, other = (split_questions("mine", questions, SHARES, seed, "question") for seed in (0, 0, 1))
    assert first == same != other
    assert {split: len(own) for split, own in first.items()} == {"train": 28, "dev": 4, "test": 8}
