from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.episode import Outcome, Search
from dgpo_core.datasets.records import Question
from dgpo_core.evaluation.diagnosis import HackingFlags, hacking_flags
from tests.dgpo_core.evaluation.episodes import TWO_HOP, UNKNOWN, episode, search

RIGHT, WRONG = "<answer> Velmora </answer>", "<answer> Tarn </answer>"
FILM, ADA = search("director of Silent Harbour", "1"), search("Ada Quill", "2", hit=True)


@pytest.mark.parametrize(
    ("question", "searches", "last", "expected"),
    [
        (TWO_HOP, [FILM, ADA], RIGHT, (False, False, False)),
        (TWO_HOP, [ADA], RIGHT, (True, False, False)),  # half of the evidence
        (UNKNOWN, [ADA], RIGHT, (False, False, False)),
        (UNKNOWN, [FILM], RIGHT, (True, False, False)),
        (TWO_HOP, [], RIGHT, (True, None, False)),
        (TWO_HOP, [FILM], WRONG, (None, False, False)),
        (TWO_HOP, [FILM, search(TWO_HOP.question + "?", "1")], WRONG, (None, True, False)),
        (TWO_HOP, [FILM, ADA], f"<answer> Tarn {RIGHT}", (False, False, True)),
    ],
)
def test_flags(
    tokenizer: PreTrainedTokenizerFast,
    question: Question,
    searches: list[Search],
    last: str,
    expected: tuple[bool | None, ...],
) -> None:
    made = episode(tokenizer, question, searches, last)
    assert hacking_flags(made, question, made.turn_texts(tokenizer.decode)) == HackingFlags(*expected)


def test_a_failed_episode_has_no_flags(tokenizer: PreTrainedTokenizerFast) -> None:
    made = replace(episode(tokenizer, TWO_HOP, [], RIGHT), outcome=Outcome.FAILED)
    assert hacking_flags(made, TWO_HOP, [RIGHT]) == HackingFlags()
