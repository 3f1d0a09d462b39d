"""Answer metrics: cases computed by hand, their properties, and FlashRAG's implementation."""

from unicodedata import is_normalized

import pytest
from flashrag.evaluator.metrics import ExactMatch, F1_Score, Sub_ExactMatch
from flashrag.evaluator.utils import normalize_answer
from hypothesis import example, given
from hypothesis import strategies as st

from dgpo_core.agent import answers
from dgpo_core.agent.answers import contains_answer, exact_match, token_f1
from dgpo_core.text import canonical, normalize, without_articles

TEXT = st.text(max_size=30) | st.lists(
    st.sampled_from(["a", "An", "the", "by", "Paris,", "yes", "no", "U.S.", "x-y", " \n"]), max_size=6
).map(" ".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("an apple a day", "apple day"),
        ("Stand by Me", "stand by me"),
        ("U.S.A.", "usa"),
        ("t.he end", "end"),
        ("theatre and others", "theatre and others"),
        (" \t\n", ""),
        ("ÉCOLE", "école"),
        ("E\u0301cole", "école"),
        ("e-\u0301cole", "école"),
        ("Jos\u00e9 \u200fIb\u00adáñez\u200b", "josé ibáñez"),
        ("what\u037e", "what"),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(TEXT)
def test_normalizing_twice_changes_nothing(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize(
    ("prediction", "golden", "expected"),
    [
        ("the Paris.", ["London", "paris"], True),
        ("Paris France", ["paris"], False),
        (None, ["paris"], False),
        ("", ["paris"], False),
        ("written by Ada", ["written Ada"], False),
        ("Jose\u0301\u200b", ["José"], True),
        ("A", ["a"], True),  # normalises to nothing: compared as it is written
        (" a\u200b ", ["A"], True),
        ("the", ["A"], False),
        (".", ["A"], False),
        ("The  The", ["the the"], True),
        ("an", ["?"], False),
        ("?", ["?"], True),
        ("", [""], False),
        ("the", [""], False),
        (" \u200b", [""], False),
    ],
)
def test_exact_match(prediction: str | None, golden: list[str], expected: bool) -> None:
    assert exact_match(prediction, golden) is expected


@pytest.mark.parametrize(
    ("text", "golden", "expected"),
    [
        ("It is in Paris, France", ["paris"], True),
        ("It is in Lyon", ["Paris", "the Lyon"], True),
        ("It is in Lyon", ["Paris"], False),
        (None, ["Paris"], False),
        ("It is in Lyon", ["The"], False),
        ("the", ["The"], True),
        ("the", ["A"], False),
        ("the", [""], False),
        ("Lyon", [""], False),
        ("Jose\u0301 of Lyon", ["José"], True),
    ],
)
def test_contains_answer(text: str | None, golden: list[str], expected: bool) -> None:
    assert contains_answer(text, golden) is expected


@pytest.mark.parametrize(
    ("prediction", "golden", "expected"),
    [
        ("Paris France", ["paris"], 2 * 0.5 * 1 / 1.5),
        ("red red blue", ["red green"], 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("Paris", ["London", "Paris city"], 2 * 1 * 0.5 / 1.5),
        ("yes", ["yes it is"], 0.0),
        ("yes", ["Yes."], 1.0),
        ("London", ["Paris"], 0.0),
        ("A", ["A"], 1.0),
        ("the", ["A"], 0.0),
        ("", [""], 0.0),
        (None, ["Paris"], 0.0),
        ("Paris", [], 0.0),
    ],
)
def test_token_f1(prediction: str | None, golden: list[str], expected: float) -> None:
    assert token_f1(prediction, golden) == pytest.approx(expected)


FLASHRAG = [metric({"dataset_name": "nq"}) for metric in (ExactMatch, F1_Score, Sub_ExactMatch)]


@example("The Beatles", ["beatles", "The Fab Four"])
@example("yes", ["No"])
@example("no answer", ["noanswer"])
@example("noanswer", ["no answer", "noanswer at all"])
@example("14 December 1972", ["December 14, 1972"])
@example("a.the", ["the a"])
@example("İstanbul", ["istanbul", "i̇stanbul"])
@example("“Paris”", ["Paris"])
@example("rock\u00a0and roll", ["rock and roll"])
@given(TEXT, st.lists(TEXT, max_size=4))
def test_flashrag_scores_the_same(prediction: str, golden: list[str]) -> None:
    em, f1, sub_em = FLASHRAG
    # FlashRAG's texts have one spelling, or they differ
    prediction, golden = canonical(prediction), [canonical(answer) for answer in golden]
    if all(is_normalized("NFC", normalize_answer(text)) for text in (prediction, *golden)):
        assert normalize(prediction) == normalize_answer(prediction)
        # an answer that normalises to nothing equals every other such text there, and stands in every text
        if all(map(normalize, golden)):
            assert exact_match(prediction, golden) == bool(em.calculate_em(prediction, golden))
            scores = f1.token_level_scores(prediction, golden)
            assert token_f1(prediction, golden) == pytest.approx(scores["f1"])
            assert contains_answer(prediction, golden) == bool(sub_em.calculate_sub_em(prediction, golden))


@pytest.mark.parametrize("piece", [1, 7, answers.PIECE])
@given(st.lists(TEXT, max_size=8), st.lists(TEXT, min_size=1, max_size=3))
def test_a_long_text_is_looked_through_in_pieces(piece: int, texts: list[str], golden: list[str]) -> None:
    """Wherever it is cut, an answer is found where it stands in the whole normalised text."""
    text = "".join(texts)
    whole, wanted = normalize(text), [normalize(answer) for answer in golden]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "PIECE", piece)
        stands = any(a in whole for a in wanted if a) if whole else exact_match(text, golden)
        assert contains_answer(text, golden) == stands


def test_a_long_text_is_read_no_further_than_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counted(text: str) -> str:
        read.append(len(text))
        return without_articles(text)

    monkeypatch.setattr(answers, "without_articles", counted)
    text = "Ada was born in Paris. " + "Nobody knows more. " * 20_000
    assert contains_answer(text, ["Paris"])
    assert 0 < sum(read) < 3 * answers.PIECE < len(text) / 10


@given(TEXT, TEXT)
def test_metrics_are_symmetric_and_ordered(first: str, second: str) -> None:
    assert token_f1(first, [second]) == pytest.approx(token_f1(second, [first]))
    assert exact_match(first, [second]) == exact_match(second, [first])
    assert exact_match(first, [second]) <= contains_answer(first, [second])
    if exact_match(first, [second]):
        assert token_f1(first, [second]) == pytest.approx(1.0)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=4))
def test_more_golden_answers_never_lower_a_metric(prediction: str, golden: list[str]) -> None:
    for metric in (exact_match, contains_answer, token_f1):
        assert metric(prediction, golden) == max(metric(prediction, [answer]) for answer in golden)
