"""Answers that no passage has, and questions of two splits."""

from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.datasets.audit import AnswerSearch, audit
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.text import normalize
from dgpo_core.world.facts import generate_world
from dgpo_core.world.questions import write_articles, write_questions
from tests.dgpo_core.making import SMALL_WORLD

Splits = dict[tuple[str, str], list[Question]]


def asked(*texts: str, answers: tuple[str, ...] = ("x",)) -> list[Question]:
    return [Question(str(i), text, answers) for i, text in enumerate(texts)]


def read(questions: Splits, *texts: str) -> AnswerSearch:
    answers = AnswerSearch(questions)
    for text in texts:
        answers.read(Passage("0", "Title", text))
    return answers


def test_share_of_answerable_questions() -> None:
    golden = {
        ("Ann Lee",): 1.0, ("Nobody", "the River!"): 1.0, ("Ann Smith",): 0.0, ("yes",): 1.0, ("A",): 1.0,
        ("東京",): 1.0, ("大阪",): 0.0, ("New York City",): 1.0,
    }  # fmt: skip
    questions = {("nq", "test"): [Question(str(i), "q", answers) for i, answers in enumerate(golden)]}
    texts = ("By Ann Lee.", "An annual report", "It lies on a river.", "首都は東京です", "New York, city")
    answers = read(questions, *texts)
    assert [answers.answerable([question]) for question in questions["nq", "test"]] == [*golden.values()]
    assert answers.answerable(questions["nq", "test"]) == 6 / 8


WORDS = st.lists(st.sampled_from(["red", "Red,", "house", "the", "Ada"]), min_size=1, max_size=4).map(
    " ".join
)


@given(st.lists(WORDS, min_size=1, max_size=6), st.lists(WORDS, max_size=6))
def test_found_is_what_stands_in_a_passage_as_whole_words(golden: list[str], texts: list[str]) -> None:
    questions = {("nq", "test"): [Question(str(i), "q", (answer,)) for i, answer in enumerate(golden)]}
    answers = read(questions, *texts)
    passages = [f" {normalize(Passage('0', 'Title', text).contents)} " for text in texts]
    for question in questions["nq", "test"]:
        wanted = normalize(question.golden_answers[0])
        expected = not wanted or any(f" {wanted} " in passage for passage in passages)
        assert answers.answerable([question]) == expected


def test_questions_of_training_in_other_splits_are_counted_whatever_their_form() -> None:
    questions = {
        ("nq", "train"): asked("on which river lies town 0", "ON WHICH RIVER LIES TOWN 1?"),
        ("nq", "dev"): asked("Who is José?"),
        ("hotpotqa", "dev"): asked("On which river lies town 1"),
        ("nq", "test"): asked("on which river lies  Town 1", "who is Jose\u0301", "what is new"),
    }
    found = audit(questions, read(questions, "x"))
    leaks = {key: count for key, count in found.counts.items() if key.endswith("_in_train")}
    assert leaks == {"nq_dev_in_train": 0, "hotpotqa_dev_in_train": 1, "nq_test_in_train": 2}
    assert "nq_test: 2 of 3 questions are also in the training files" in found.remarks
    assert not any(remark.startswith("nq_dev") for remark in found.remarks)


def test_what_is_missing_is_said() -> None:
    questions = {("nq", "test"): asked("a", "b", "c", answers=("A", "?", "")) + asked("d", answers=("Rome",))}
    found = audit(questions, read(questions))
    assert found.counts == {"nq_test_answerable": 0.75, "nq_test_in_train": 0, "nq_test_wordless_answers": 9}
    assert found.remarks == []
    questions = {("nq", "test"): asked("d", "e", answers=("Rome",))}
    assert audit(questions, read(questions, "Paris")).remarks == [
        "nq_test: no passage has an answer to 100% of 2 questions"
    ]


def test_the_embedded_world_answers_all_its_questions_and_leaks_none() -> None:
    world = generate_world(SMALL_WORLD, 1)
    articles = write_articles(world)
    questions = write_questions(world, articles)
    texts = [passage.contents for article in articles for passage in article.passages]
    found = audit(questions, read(questions, *texts))
    assert {value for key, value in found.counts.items() if key.endswith("_answerable")} == {1.0}
    assert {value for key, value in found.counts.items() if key.endswith("_in_train")} == {0}
    assert found.remarks == []
