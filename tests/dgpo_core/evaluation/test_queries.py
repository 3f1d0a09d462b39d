import pytest

from dgpo_core.datasets.records import Question
from dgpo_core.evaluation.diagnosis import content_words, is_sensible, repeats
from tests.dgpo_core.evaluation.episodes import ONE_HOP, TWO_HOP, UNKNOWN

BOTH, SECOND = frozenset({"1", "2"}), frozenset({"2"})


def test_content_words() -> None:
    assert content_words("Who is the director\N{RIGHT SINGLE QUOTATION MARK}s wife? Ada's.") == {
        "director", "wife", "ada"
    }  # fmt: skip
    assert content_words("what is it?") == frozenset()


def test_repeats_ignores_case_and_punctuation() -> None:
    assert repeats("Where was Ada born?", ["where was ada born"])
    assert not repeats("Ada born", ["where was ada born"])


@pytest.mark.parametrize(
    ("query", "earlier", "missing", "expected"),
    [
        ("Silent Harbour", [], BOTH, True),
        ("born director", [], BOTH, False),
        ("who made silent harbour?", ["Silent Harbour"], BOTH, True),
        ("silent harbour", ["Silent Harbour?"], BOTH, False),
        ("Ada Quill", ["Silent Harbour"], SECOND, True),
        ("Ada", ["Silent Harbour"], SECOND, False),
        ("director of Silent Harbour", ["Silent Harbour"], SECOND, False),  # its passage is there already
        ("Ada Quill", [], BOTH, False),  # nothing has named her yet
    ],
)
def test_sensible_names_a_missing_passage(
    query: str, earlier: list[str], missing: frozenset[str], expected: bool
) -> None:
    assert is_sensible(query, TWO_HOP, earlier, missing) is expected


def test_what_stands_in_brackets_is_no_part_of_a_name() -> None:
    assert not is_sensible("the film Harbour", ONE_HOP, [], frozenset({"1"}))
    assert is_sensible("the film Silent Harbour", ONE_HOP, [], frozenset({"1"}))


def test_a_title_that_nothing_names_leaves_any_content_word() -> None:
    passage = {"id": "7", "title": "Discography", "text": "..."}
    question = Question("q", "who sings the harbour song", ("Ada",), {"golden_passages": [passage]})
    assert is_sensible("harbour song singer", question, [], frozenset({"7"}))
    assert not is_sensible("who is the president", question, [], frozenset({"7"}))


def test_without_gold_passages_only_a_first_query_must_share_a_word() -> None:
    assert not is_sensible("Ada Quill", UNKNOWN, [], frozenset())
    assert is_sensible("Ada Quill", UNKNOWN, ["Silent Harbour"], frozenset())
    assert not is_sensible("who is it", UNKNOWN, ["Silent Harbour"], frozenset())
