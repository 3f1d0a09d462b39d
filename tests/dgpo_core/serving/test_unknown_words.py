"""What a question asks about that no passage has: names, or else everything."""

import pytest

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.index import Index, index_passages
from dgpo_core.serving.unknown_words import unknown_note, unknown_words
from tests.dgpo_core.agent.scripted import Answering

TEXTS = {
    "Ada Lind": "Ada Lind was born in Paris.",
    "Vuki": "The film Vuki came out in 1953.",
    "東京": "首都は東京です",
}


@pytest.fixture(scope="module")
def passages() -> Index:
    made = [Passage(str(n), title, text) for n, (title, text) in enumerate(TEXTS.items())]
    return index_passages(made, EncoderConfig(kind="bm25"))


@pytest.mark.parametrize(
    ("question", "unknown"),
    [
        ("Where was Ada Lind born?", []),
        ("Where was Marie Curie born?", ["Marie", "Curie"]),
        ("Is Ada Lind older than Marie Curie's sister?", ["Marie", "Curie"]),
        ("Who directed “Vuki”?", []),
        ("hello", ["hello"]),
        ("who was born in the film", []),  # no names, and one word is known
        ("what is it?", []),  # nothing is asked about
        ("東京", []),
        ("大阪", ["大阪"]),
        ("", []),
    ],
)
def test_words_of_no_passage(passages: Index, question: str, unknown: list[str]) -> None:
    assert unknown_words(question, [], passages, 3) == unknown


def test_what_was_found_is_known_and_a_dead_index_says_nothing() -> None:
    index = Answering(failures=1)
    assert unknown_words("Where was Marie Curie born?", ["Marie Curie, the physicist"], index, 3) == []
    assert index.calls == 0, "no search was needed"
    assert unknown_words("Where was Marie Curie born?", [], index, 3) == []
    assert unknown_words("Where was Marie Curie born?", [], index, 3) == ["Marie", "Curie"]


def test_the_note_names_them() -> None:
    assert unknown_note(["Marie", "Curie"]) == "no passage that was found has Marie, Curie"
    assert unknown_note([]) is None
