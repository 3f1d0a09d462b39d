"""Gold contexts from MuSiQue's and NQ's own files, and the join."""

import copy
import json
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.datasets.published import Gold, add_gold, read_musique, read_nq
from dgpo_core.datasets.records import Question, read_questions
from dgpo_core.errors import UserError
from tests.samples import SAMPLES

ORIGINAL, SIMPLIFIED = SAMPLES / "nq/nq-dev-original.jsonl", SAMPLES / "nq/nq-dev-simplified.jsonl"
MUSIQUE = SAMPLES / "musique/musique_ans_v1.0_dev.jsonl"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_supporting_paragraphs_of_musique() -> None:
    golds = list(read_musique(MUSIQUE))
    assert len(golds) == 4
    assert golds[0].answers == ("Port Calder", "Calder")
    passages = golds[0].metadata["golden_passages"]
    assert [passage["title"] for passage in passages] == [
        "The Salt Lantern (film)",
        "Hedda Marsh",
        "Port Calder",
    ]
    assert passages[2]["text"].startswith("Port Calder is the capital of the Republic of Ostrany.")


def test_long_answers_of_nq_by_short_answer_then_votes() -> None:
    """Two annotators chose the table, which has no short answer; two the paragraph, which has one."""
    lighthouse, born, taught = read_nq(ORIGINAL)
    assert lighthouse.metadata["long_answers"] == [
        "Its lighthouse was built in 1874 by the engineer Tobias Renn .",
        "Lighthouse 1874",
    ]
    assert lighthouse.metadata["golden_passages"] == [
        {"title": "Marrowick", "text": "Its lighthouse was built in 1874 by the engineer Tobias Renn ."}
    ]
    assert lighthouse.answers == ("Tobias Renn", "Tobias Renn")
    assert born.metadata["long_answers"] == ["Ilsa Thornevald was a poet who was born in Marrowick ."]
    assert taught.metadata == {}


def test_both_forms_of_nq_give_the_same(tmp_path: Path) -> None:
    """The simplified form, made from the original one as NQ's own utility does: tokens joined by spaces."""
    simplified = tmp_path / "simplified.jsonl"
    with simplified.open("w") as file:
        for row in rows(ORIGINAL):
            row["document_text"] = " ".join(token["token"] for token in row.pop("document_tokens"))
            file.write(json.dumps(row) + "\n")
    assert list(read_nq(simplified)) == list(read_nq(ORIGINAL))


def test_join_of_the_samples_counts_its_losses() -> None:
    questions, counts = add_gold(
        read_questions(SAMPLES / "flashrag/musique/dev.jsonl"), read_musique(MUSIQUE), "m"
    )
    assert counts == {"joined": 3, "not_found": 1, "other_answer": 0, "no_gold": 0, "ambiguous": 0}
    assert [len(q.metadata.get("golden_passages", [])) for q in questions] == [3, 2, 3, 0]
    golds = [*read_nq(ORIGINAL), *read_nq(SIMPLIFIED)]
    questions, counts = add_gold(read_questions(SAMPLES / "flashrag/nq/test.jsonl"), golds, "n")
    assert counts == {"joined": 3, "not_found": 1, "other_answer": 0, "no_gold": 1, "ambiguous": 0}
    assert questions[2].metadata["long_answers"] == ["The Salt Lantern is an opera by Benno Karsk ."]


def gold(answer: str, text: str, question: str = "Who wrote it?") -> Gold:
    return Gold(question, (answer,), {"golden_passages": [{"title": "T", "text": text}]} if text else {})


@pytest.mark.parametrize(
    ("golds", "reason", "text"),
    [
        ([gold("Ada", "a")], "joined", "a"),
        ([gold("ada.", "a", "who  WROTE it")], "joined", "a"),
        ([gold("Bob", "b"), gold("Ada", "a")], "joined", "a"),
        ([gold("Ada", "a"), gold("Ada", "a")], "joined", "a"),
        ([gold("Ada", "a"), gold("Ada", "other")], "ambiguous", None),
        ([gold("Bob", "b")], "other_answer", None),
        ([gold("Ada", "")], "no_gold", None),
        ([gold("Ada", "a", "Who wrote that?")], "not_found", None),
    ],
)
def test_partners(golds: list[Gold], reason: str, text: str | None) -> None:
    sure = Question("sure", "Is this found?", ("yes",))
    asked = [Question("q", "Who wrote it?", ("Ada", "A. D. A. L.")), sure]
    questions, counts = add_gold(asked, [*golds, gold("yes", "x", "is this found")], "file")
    assert counts[reason] == (2 if reason == "joined" else 1)
    assert sum(counts.values()) == 2
    passages = questions[0].metadata.get("golden_passages", [])
    assert [passage["text"] for passage in passages] == ([text] if text else [])


def test_a_file_without_any_partner_is_refused() -> None:
    with pytest.raises(UserError, match=r"other\.jsonl: has a gold context for none of 1 questions"):
        add_gold([Question("q", "Who?", ("Ada",))], [gold("Ada", "a")], "other.jsonl")


GOOD_MUSIQUE, GOOD_NQ = rows(MUSIQUE)[0], rows(ORIGINAL)[0]


def long_answer(start: object, end: int) -> dict[str, Any]:
    span = {"start_token": start, "end_token": end}
    return {"annotations": [{"short_answers": [], "long_answer": span}]}


def paragraph(**fields: object) -> dict[str, Any]:
    return {"paragraphs": [{"title": "T", **fields}]}


@pytest.mark.parametrize(
    ("good", "change", "message"),
    [
        (GOOD_MUSIQUE, {"question": None}, 'key "question" must be a string'),
        (GOOD_MUSIQUE, {"paragraphs": {}}, 'key "paragraphs" must be a list of objects'),
        (GOOD_MUSIQUE, paragraph(is_supporting=True), 'key "paragraph_text" must be a string'),
        (GOOD_MUSIQUE, paragraph(paragraph_text="t"), 'key "is_supporting" must be true or false'),
        (GOOD_MUSIQUE, {"answer_aliases": "x"}, 'key "answer_aliases" must be a list of strings'),
        (GOOD_NQ, {"question_text": 3}, 'key "question_text" must be a string'),
        (GOOD_NQ, {"document_tokens": [{"token": "x"}]}, "a token has no 'html_token'"),
        (GOOD_NQ, {"annotations": [{"short_answers": []}]}, 'key "long_answer" must be an object'),
        (GOOD_NQ, long_answer(True, 2), 'key "start_token" must be an integer'),
        (GOOD_NQ, long_answer(0, 999), "an answer of tokens 0 to 999 in a document of 43"),
    ],
)  # fmt: skip
def test_malformed_rows_name_file_and_line(
    tmp_path: Path, good: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "gold.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, good | change)))
    with pytest.raises(UserError) as caught:
        list((read_musique if good is GOOD_MUSIQUE else read_nq)(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert str(caught.value).endswith(message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_no_damage_is_anything_but_the_users_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any value anywhere in a record: it is read, or refused with its line."""
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    for good, read in ((GOOD_MUSIQUE, read_musique), (GOOD_NQ, read_nq)):
        record: Any = copy.deepcopy(good)
        place = record
        for _ in range(data.draw(st.integers(0, 3))):
            inner = [value for value in _values(place) if isinstance(value, list | dict) and value]
            if not inner:
                break
            place = data.draw(st.sampled_from(inner))
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place[key] = data.draw(JSON)
        path.write_text(json.dumps(record) + "\n")
        try:
            list(read(path))
        except UserError as error:
            assert str(error).startswith(f"{path}:1: ")


def _values(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else container


def test_questions_join_in_either_spelling() -> None:
    gold = Gold(normalize("NFD", "Who is José?"), (normalize("NFD", "Ibáñez"),), {"long_answers": ["x"]})
    _, counts = add_gold([Question("1", "who is jos\u200bé", ("Ibáñez",))], [gold], "m")
    assert counts["joined"] == 1
