from typing import Any

import pytest

from dgpo_core.datasets.records import Question
from dgpo_core.evaluation.diagnosis import ANY_HIT, missing_evidence, needed, new_evidence
from tests.dgpo_core.evaluation.episodes import TWO_HOP, UNKNOWN, search

PASSAGE = {"id": "1", "title": "A", "text": "a"}
ANOTHER = {"title": "B", "text": "b"}  # who knows which of the corpus


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {ANY_HIT}),
        ({"golden_passages": []}, {ANY_HIT}),
        ({"golden_passages": [PASSAGE, ANOTHER]}, {ANY_HIT}),
        ({"golden_passages": [PASSAGE]}, {"1"}),
    ],
)
def test_all_gold_passages_or_any_hit(metadata: dict[str, Any], expected: set[str]) -> None:
    assert needed(Question("q", "Who?", ("x",), metadata)) == expected


def test_each_piece_of_evidence_counts_for_the_search_that_found_it_first() -> None:
    searches = [search("a", "1", "9"), search("b", "1", hit=True), search("c", "2", "1")]
    assert new_evidence(TWO_HOP, searches) == [{"1"}, frozenset(), {"2"}]
    assert missing_evidence(TWO_HOP, searches[:2]) == {"2"}
    assert not missing_evidence(TWO_HOP, searches)
    assert new_evidence(UNKNOWN, searches) == [frozenset(), {ANY_HIT}, frozenset()]
    assert missing_evidence(UNKNOWN, []) == {ANY_HIT}
