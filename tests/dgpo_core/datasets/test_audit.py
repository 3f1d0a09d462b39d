"""What can be answered, found and is asked twice, counted by hand; which figures stop the pipeline."""

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.config.data import AuditConfig
from dgpo_core.datasets.audit import Audit, CorpusAudit, Probes, Room, audit, beyond, script
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.reporting.data_page import markdown, render
from dgpo_core.text import normalize
from dgpo_core.world.facts import generate_world
from dgpo_core.world.questions import write_articles, write_questions
from tests.dgpo_core.making import SMALL_WORLD

WIDE = Room(100, 100)
Splits = dict[tuple[str, str], list[Question]]


def asked(*texts: str, answers: tuple[str, ...] = ("x",)) -> list[Question]:
    return [Question(str(i), text, answers) for i, text in enumerate(texts)]


def read(questions: Splits, *texts: str) -> CorpusAudit:
    corpus = CorpusAudit(questions)
    for text in texts:
        corpus.read(Passage("0", "Title", text))
    return corpus


def words(text: str) -> int:
    return len(text.split())


def examine(questions: Splits, *texts: str, searched: int = 100, room: Room = WIDE) -> Audit:
    """Audit with a search that finds the passages with a word of the query, and tokens that are words."""

    def search(queries: list[str]) -> list[list[Passage]]:
        return [
            [Passage("0", "", text) for text in texts if {*query.split()} & {*text.split()}][:2]
            for query in queries
        ]

    probes = Probes(search, words, lambda passages: sum(words(passage.text) for passage in passages))
    return audit(questions, read(questions, *texts), probes, room, searched)


def test_share_of_answerable_questions() -> None:
    golden = {
        ("Ann Lee",): 1.0, ("Nobody", "the River!"): 1.0, ("Ann Smith",): 0.0, ("yes",): 1.0, ("A",): 1.0,
        ("東京",): 1.0, ("大阪",): 0.0, ("New York City",): 1.0,
    }  # fmt: skip
    questions = {("nq", "test"): [Question(str(i), "q", answers) for i, answers in enumerate(golden)]}
    texts = ("By Ann Lee.", "An annual report", "It lies on a river.", "首都は東京です", "New York, city")
    answers = read(questions, *texts).answers
    assert [answers.answerable([question]) for question in questions["nq", "test"]] == [*golden.values()]
    assert answers.answerable(questions["nq", "test"]) == 6 / 8


WORDS = st.lists(st.sampled_from(["red", "Red,", "house", "the", "Ada"]), min_size=1, max_size=4).map(
    " ".join
)


@given(st.lists(WORDS, min_size=1, max_size=6), st.lists(WORDS, max_size=6))
def test_found_is_what_stands_in_a_passage_as_whole_words(golden: list[str], texts: list[str]) -> None:
    questions = {("nq", "test"): [Question(str(i), "q", (answer,)) for i, answer in enumerate(golden)]}
    answers = read(questions, *texts).answers
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
    found = examine(questions, "x")
    leaks = {"_".join(key): own.in_train for key, own in found.splits.items()}
    assert leaks == {"nq_train": None, "nq_dev": 0, "hotpotqa_dev": 1, "nq_test": 2}
    assert found.metrics["nq_test_in_train"] == 2 and "nq_train_in_train" not in found.metrics
    assert "nq_test: 2 of 3 questions are also in the training files" in found.remarks
    assert not any(remark.startswith("nq_dev") for remark in found.remarks)


def test_answers_of_training_and_questions_asked_twice() -> None:
    """By hand: yes is no entity, "The Nile" is "nile"; of the test questions the first two have an answer."""
    questions = {
        ("mine", "train"): asked("a", "b", answers=("The Nile", "yes")),
        ("mine", "test"): [
            *asked("c", "C?", answers=("nile!",)),
            *asked("d", answers=("yes",)),
            *asked("e", answers=("Po",)),
        ],
    }  # fmt: skip
    own = examine(questions, "Nile and Po").splits["mine", "test"]
    assert (own.answers_in_train, own.repeated, own.answerable) == (0.5, 1, 1.0)


def test_answers_in_gold_passages_and_in_what_the_question_finds() -> None:
    gold = {"golden_passages": [{"title": "Ann", "text": "born in Rome"}]}
    questions = {
        ("mine", "test"): [
            Question("0", "where was ann born", ("Rome",), gold),
            Question("1", "where was ann married", ("Paris",), gold),
            Question("2", "who ruled", ("Ann",)),
        ],
        ("other", "test"): asked("nothing"),
    }
    texts = ("ann born in Rome", "ann again", "Paris was ruled by Ann Smith")
    found = examine(questions, *texts)
    own = found.splits["mine", "test"]
    assert (own.in_gold, own.in_top_k, own.answerable) == (1 / 2, 2 / 3, 1.0)
    assert found.splits["other", "test"].in_gold is None
    assert examine(questions, *texts, searched=1).splits["mine", "test"].in_top_k == 1.0


def test_lengths_against_the_protocol() -> None:
    questions = {("mine", "test"): asked("one two three four", "one two", "three", "none")}
    found = examine(questions, "one is long", "two is long", room=Room(prompt=3, shown=5))
    own = found.splits["mine", "test"]
    assert (own.prompt_tokens, own.long_questions, own.cut_results) == (4, 0.25, 0.5)
    assert found.passages == 2 and found.longest_words == 4  # with the title


def test_scripts_by_most_letters() -> None:
    texts = ["The town", "Где это, Ann?", "東京はどこ", "1990 ?!", "Zoë là", "ひらがな漢"]
    assert [script(text) for text in texts] == ["Latin", "Cyrillic", "Hiragana", "", "Latin", "Hiragana"]
    questions = {("mine", "test"): asked("Где это?", "where is it")}
    found = examine(questions, "It is there", "Here")
    assert found.splits["mine", "test"].scripts == {"Cyrillic": 0.5, "Latin": 0.5}
    assert "mine_test: questions in Cyrillic, in which there are hardly any passages" in found.remarks


def test_what_is_missing_is_said() -> None:
    wordless = asked("a", "b", "c", answers=("A", "?", ""))
    questions = {("nq", "test"): wordless + asked("d", answers=("Rome",))}
    found = examine(questions, "x")
    own = found.splits["nq", "test"]
    assert (own.answerable, own.in_train, own.wordless_answers) == (0.75, 0, 9)
    questions = {("nq", "test"): asked("d", "e", answers=("Rome",))}
    assert examine(questions, "Paris").remarks == ["nq_test: no passage has an answer to 100% of 2 questions"]


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (
            asked("new", answers=("Oslo",)),
            "a passage has an answer to 0.0% of 1 questions, below audit.min_answ",
        ),
        (asked("Known!"), "training asks 1 of 1 questions too, above audit.max_in_train 0.5"),
        (
            asked("a b c d e f"),
            "100.0% of 1 questions leave no room for a turn in protocol.max_context, above",
        ),
        (asked("new"), ""),
    ],
)
def test_limits_stop_with_the_reason(questions: list[Question], message: str) -> None:
    splits = {("mine", "train"): asked("known"), ("mine", "test"): questions}
    found = examine(splits, "x", room=Room(5, 100))
    stops = beyond(found, AuditConfig())
    assert [line.startswith(f"mine/test: {message}") for line in stops] == [True] * bool(message)
    none = AuditConfig(min_answerable=0.0, max_in_train=1.0, max_long_questions=1.0)
    assert beyond(found, none) == []


def test_the_page_and_its_markdown_say_the_same(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    questions = {("mine", "train"): asked("a", "b"), ("mine", "test"): asked("a", f"c {hostile}")}
    found = examine(questions, "x y", "a")
    stops = ["mine/test: stops | here"]
    page, text = render(found, stops), markdown(found, stops)
    assert "The data stop the pipeline: 1 figures" in page and "- mine/test: stops \\| here" in text
    assert "<h1>The data are within their limits" in render(found, [])
    cells = re.findall(r"<td><b>(.*?)</b></td>", page)
    rows = [line.split(" | ")[2:] for line in text.splitlines() if line.startswith("| mine |")]
    assert cells == [cell.removesuffix(" |") for row in rows for cell in row]
    assert "http" not in page.replace("http-equiv", "") and hostile not in page


def test_the_embedded_world_answers_all_its_questions_and_leaks_none() -> None:
    world = generate_world(SMALL_WORLD, 1)
    articles = write_articles(world)
    questions = write_questions(world, articles)
    texts = [passage.contents for article in articles for passage in article.passages]
    random.Random(0).shuffle(texts)
    corpus = read(questions, *texts)
    probes = Probes(lambda queries: [[] for _ in queries], words, len)
    found = audit(questions, corpus, probes, Room(100, 100), 5)
    assert {own.answerable for own in found.splits.values()} == {1.0}
    assert {own.in_train for own in found.splits.values()} == {0, None}
    assert {own.in_gold for own in found.splits.values()} == {1.0}
    assert beyond(found, AuditConfig()) == [] and found.remarks == []
