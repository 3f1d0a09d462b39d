"""One spelling for what is compared."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.text import canonical, letters, spaced, stands_in, trimmed, visible

TEXT = st.text(max_size=12) | st.text("eE\u0301\u0327 \u200b\u00ad\u200f\ufeff-?\u0130\u037e\n", max_size=8)


@pytest.mark.parametrize("unseen", "\u200b\u200f\u202e\u00ad\ufeff\u2060\ufe0f\u034f\U000e0067\x00\x1b\x9b")
def test_what_nobody_sees_is_left_out(unseen: str) -> None:
    assert visible(f"{unseen}a{unseen} b{unseen}") == "a b"
    assert trimmed(f" {unseen} a{unseen}b \n{unseen}") == f"a{unseen}b"
    assert letters(f"A{unseen}b") == letters("ab")


@given(TEXT)
def test_white_space_and_all_that_is_seen_stay(text: str) -> None:
    kept = {c for c in text if c.isspace() or unicodedata.category(c)[0] in "NPS"}
    assert kept <= set(visible(text))


@given(TEXT)
def test_canonical_twice_changes_nothing_and_spellings_agree(text: str) -> None:
    assert canonical(canonical(text)) == canonical(text)
    for form in ("NFC", "NFD"):
        assert canonical(unicodedata.normalize(form, text)) == canonical(text)
        assert letters(unicodedata.normalize(form, text)) == letters(text)


@given(TEXT)
def test_trimmed_is_a_part_that_begins_and_ends_with_what_is_seen(text: str) -> None:
    part = trimmed(text)
    assert part in text
    assert visible(part).strip() == visible(text).strip()
    assert not part or (visible(part[0]).strip() and visible(part[-1]).strip())


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Who is José?", " WHO  is Jose\u0301", True),
        ("Straße", "STRASSE", True),
        ("का क्या", "कि क्या", False),  # vowel signs are marks, no letters
        ("?", "!", False),
        ("C++", "C", True),
    ],
)
def test_letters(first: str, second: str, same: bool) -> None:
    assert (letters(first) == letters(second)) is same


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        ("ann", "annual report", False),
        ("ann lee", "by ann lee", True),
        ("東京", "首都は東京です", True),
        ("กรุงเทพ", "เมืองกรุงเทพมหานคร", True),
        ("东京", "首都は東京です", False),
    ],
)
def test_stands_in(words: str, text: str, expected: bool) -> None:
    assert stands_in(words, text) is expected


@given(st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x0DFF)))
def test_texts_with_spaces_are_left_as_they_are(text: str) -> None:
    """Latin, Greek, Cyrillic, Hebrew, Arabic, the scripts of India: the same text, so the same tokens."""
    assert spaced(text) == text
