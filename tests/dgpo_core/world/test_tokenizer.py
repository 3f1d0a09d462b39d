"""The embedded tokenizer loses nothing, and gives a name the same tokens wherever it stands."""

import string
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dgpo_core.agent.prompts import INVALID_ACTION, TAGS
from dgpo_core.world.facts import World
from dgpo_core.world.pretraining import build_tokenizer
from dgpo_core.world.questions import Article, write_questions

PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " \n"
TOKENIZER = build_tokenizer()


def round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    assert isinstance(decoded, str)
    return decoded


@given(st.lists(st.text(PRINTABLE, max_size=10) | st.sampled_from(TAGS), max_size=5).map("".join))
def test_printable_text_round_trips(text: str) -> None:
    assert round_trip(TOKENIZER, text) == text


def test_world_round_trips_without_unknown_tokens(
    world: World, articles: list[Article], tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [p.contents for article in articles for p in article.passages]
    texts += [q.question for questions in write_questions(world, articles).values() for q in questions]
    for text in [*texts, INVALID_ACTION]:
        assert round_trip(tokenizer, text) == text
        assert tokenizer.unk_token_id not in tokenizer.encode(text, add_special_tokens=False)


def test_names_always_have_the_same_tokens(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    def inside(text: str, ids: list[int]) -> bool:
        where = tokenizer.encode(text, add_special_tokens=False)
        return any(where[i : i + len(ids)] == ids for i in range(len(where)))

    for entity in world.entities:
        ids = tokenizer.encode(f" {entity.name}", add_special_tokens=False)
        for text in (
            "was born in {}.",
            "Where is {} based",
            "(Title: {}) x",
            "<answer> {} </answer>",
            " {}, or",
        ):
            assert inside(text.format(entity.name), ids), (entity.name, text)


def test_tags_are_single_tokens_and_not_special(tokenizer: PreTrainedTokenizerFast) -> None:
    for tag in TAGS:
        assert len(tokenizer.encode(tag, add_special_tokens=False)) == 1
        ids = tokenizer.encode(f"a{tag}b", add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"a{tag}b"
    assert tokenizer.eos_token == "<|im_end|>"


def test_saved_tokenizer_is_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    text = "<think> Who directed the film Karumi 1942?</think>\n"
    assert loaded.encode(text) == tokenizer.encode(text)
