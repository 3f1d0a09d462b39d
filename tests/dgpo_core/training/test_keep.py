"""Rules that keep the teacher's episodes."""

from dataclasses import replace

import pytest

from dgpo_core.agent.episode import Episode, Search
from dgpo_core.config.recipes import Keep
from dgpo_core.training.keep import keeps
from tests.dgpo_core.making import random_episode

SEARCHES = [Search("q", ["p"], [1.0])]
WRONG, MEMORY = random_episode(1, correct=False), random_episode(1, correct=True)
LUCKY = replace(MEMORY, searches=SEARCHES)
FOUND = replace(LUCKY, hit=True)
WRONG_FOUND = replace(FOUND, outcome=WRONG.outcome)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("all", [WRONG, WRONG_FOUND, MEMORY, LUCKY, FOUND]),
        ("correct", [MEMORY, LUCKY, FOUND]),
        ("searched", [LUCKY, FOUND]),
        ("evidence", [FOUND]),
    ],
)
def test_rules(rule: Keep, kept: list[Episode]) -> None:
    assert [e for e in (WRONG, WRONG_FOUND, MEMORY, LUCKY, FOUND) if keeps(rule, e)] == kept
