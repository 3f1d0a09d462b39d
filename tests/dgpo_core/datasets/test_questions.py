"""FlashRAG's question sets: files, counts, validation questions."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.config.data import PAPER_SETS, TRAINING_SETS, QuestionSetsConfig
from dgpo_core.datasets.published import (
    PASSAGES,
    TEST_QUESTIONS,
    TEST_SPLITS,
    TRAIN_QUESTIONS,
    fetch_questions,
    hold_out,
    load_questions,
)
from dgpo_core.datasets.records import Question
from dgpo_core.errors import UserError
from dgpo_core.text import letters
from tests.samples import SAMPLES, sample_config

ALL = QuestionSetsConfig()


def load(**changes: Any) -> tuple[dict[tuple[str, str], list[Question]], dict[str, int]]:
    config = sample_config(**changes)
    return load_questions(config, fetch_questions(config, ALL))


def test_the_catalogue_has_every_set_of_the_paper() -> None:
    """Table 9's columns: 169,615 training and 51,713 test questions."""
    assert (tuple(TEST_QUESTIONS), tuple(TRAIN_QUESTIONS)) == (PAPER_SETS, TRAINING_SETS)
    assert set(TEST_SPLITS) == set(PAPER_SETS)
    assert (sum(TRAIN_QUESTIONS.values()), sum(TEST_QUESTIONS.values())) == (169_615, 51_713)
    assert PASSAGES == 21_015_324


def test_all_sets_of_the_samples() -> None:
    questions, joins = load()
    sizes = {f"{name}/{split}": len(items) for (name, split), items in questions.items()}
    assert sizes == {
        "nq/train": 6, "nq/dev": 2, "nq/test": 5, "hotpotqa/train": 4, "hotpotqa/dev": 2, "hotpotqa/test": 3,
        "triviaqa/test": 2, "popqa/test": 2, "2wikimultihopqa/test": 2, "musique/test": 4,
        "bamboogle/test": 2,
    }  # fmt: skip
    assert joins["musique_gold_joined"] == 3
    assert joins["nq_gold_not_found"] == 1
    assert all(q.metadata == {} for q in questions["hotpotqa", "train"] + questions["popqa", "test"])
    assert questions["triviaqa", "test"][0].golden_answers[0] == "Ilsa Thornevald"


def test_limits_and_sets_without_gold() -> None:
    questions, joins = load(limits={"train": 3, "test": 2}, musique=[], nq=[])
    assert len(questions["nq", "train"]) == 3
    assert len(questions["nq", "dev"]) == 2
    assert len(questions["nq", "test"]) == 2
    assert joins == {}


def test_a_count_that_is_not_the_papers_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        load(check_counts=True)
    assert "nq/train has 8 records, but the paper (table 9) has 79,168" in str(caught.value)
    assert "data.published.check_counts: false" in str(caught.value)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.published\.questions: .*nq/train\.jsonl: no such file"):
        load(questions=str(tmp_path))
    shutil.copytree(SAMPLES / "flashrag", tmp_path / "flashrag")
    damaged = tmp_path / "flashrag/hotpotqa/dev.jsonl"
    lines = damaged.read_text().splitlines()
    damaged.write_text("\n".join([lines[0], lines[1].replace('"golden_answers"', '"solutions"'), lines[2]]))
    with pytest.raises(UserError) as caught:
        load(questions=str(tmp_path / "flashrag"))
    assert str(caught.value).startswith(f'{damaged}:2: key "golden_answers" is missing; its keys are')
    twice = json.loads(lines[1]) | {"id": "dev_0"}
    damaged.write_text("\n".join([lines[0], json.dumps(twice)]))
    with pytest.raises(UserError, match=r"dev\.jsonl:2: id 'dev_0' was used on line 1 before"):
        load(questions=str(tmp_path / "flashrag"))


@given(st.lists(st.integers(0, 30), min_size=2, max_size=40), st.integers(1, 35), st.randoms())
def test_held_out_questions_do_not_depend_on_the_files_order(
    texts: list[int], count: int, random: Any
) -> None:
    questions = [Question(str(i), f"question {text}", ("x",)) for i, text in enumerate(texts)]
    if count >= len(set(texts)):
        with pytest.raises(UserError, match=r"data\.published\.dev_questions: .* held out of nq"):
            hold_out("nq", questions, count)
        return
    train, dev = hold_out("nq", questions, count)
    assert sorted(train + dev, key=lambda q: int(q.id)) == questions
    assert len({q.question for q in dev}) == count
    assert not {q.question for q in dev} & {q.question for q in train}
    shuffled = random.sample(questions, len(questions))
    assert {q.id for q in hold_out("nq", shuffled, count)[1]} == {q.id for q in dev}
    larger = hold_out("nq", [*questions, Question("new", "a new one", ("x",))], count)[1]
    assert len({q.question for q in dev} - {q.question for q in larger}) <= 1, "a new text displaces one"


@given(
    st.sets(
        st.text(st.characters(categories=["Lu", "Ll", "Nd", "Zs"], max_codepoint=0x7F), min_size=1),
        min_size=3,
    )
)
def test_files_without_variants_are_split_as_ever(texts: set[str]) -> None:
    """By the hash of the text alone, so that the published sets keep their validation questions."""
    questions = [Question(str(i), text, ("x",)) for i, text in enumerate(texts) if letters(text) == text]
    if len(questions) < 3:
        return
    _, dev = hold_out("nq", questions, 2)
    digests = {q.question: hashlib.sha256(f"nq\n{q.question}".encode()).digest() for q in questions}
    assert {q.question for q in dev} == set(sorted(digests, key=digests.__getitem__)[:2])


@given(st.integers(1, 5))
def test_variants_of_a_question_are_on_one_side(count: int) -> None:
    forms = ("who is the mayor of town {}", "WHO IS THE MAYOR OF TOWN {}?", "Who is the  mayor of Town {} ?")
    questions = [
        Question(f"{i}-{n}", form.format(i), ("x",)) for n, form in enumerate(forms) for i in range(6)
    ]
    train, dev = hold_out("nq", questions, count)
    assert len(dev) == count * len(forms)
    assert not {letters(q.question) for q in train} & {letters(q.question) for q in dev}


def test_empty_golden_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "flashrag", tmp_path / "flashrag")
    changed = tmp_path / "flashrag/triviaqa/test.jsonl"
    rows = [json.loads(line) for line in changed.read_text().splitlines()]
    rows[0]["golden_answers"] = ["", *rows[0]["golden_answers"], " \u200b"]
    changed.write_text("\n".join(map(json.dumps, rows)))
    questions, counts = load(questions=str(tmp_path / "flashrag"))
    assert questions["triviaqa", "test"] == load()[0]["triviaqa", "test"]
    assert counts["triviaqa_test_empty_answers"] == 2
    assert "nq_test_empty_answers" not in counts
