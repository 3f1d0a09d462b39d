"""What of a text can be seen, one spelling for texts that are compared, and the start of a long one."""

import re
import unicodedata
from collections.abc import Callable


def remover(characters: str) -> Callable[[str], str]:
    """Return a function that removes the characters of a regular expression's class from a text, fast.

    `str.translate` is many times faster than a pattern on ASCII, and many times slower on all else.
    """
    pattern = re.compile(f"[{characters}]+")
    table = {code: None for code in range(128) if pattern.match(chr(code))}
    return lambda text: text.translate(table) if text.isascii() else pattern.sub("", text)


# Unicode's Default_Ignorable_Code_Point (soft hyphen, zero-width ones, directions, variation selectors),
# marks of annotations, and control characters that are no white space. Half a surrogate pair is none of them.
_without_invisible = remover(
    "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff"
)
# Thai, Lao, Burmese, Khmer, Japanese and Chinese put no space between words
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def visible(text: str) -> str:
    """Return `text` without the characters that nobody sees."""
    return _without_invisible(text)


def trimmed(text: str) -> str:
    """Return `text` without white space and invisible characters at its ends."""
    seen = visible(text).strip()
    return text[text.index(seen[0]) : text.rindex(seen[-1]) + 1] if seen else ""


def canonical(text: str) -> str:
    """Return `text` in one spelling: what can be seen of it, in composed letters (Unicode's NFC)."""
    return unicodedata.normalize("NFC", visible(text))


def letters(text: str) -> str:
    """Return letters (with their marks) and digits of `text`, whatever its case, spaces and punctuation.

    A text without any is returned whole.
    """
    folded = canonical(canonical(text).casefold())
    kept = (c for c in folded if c.isalnum() or unicodedata.category(c).startswith("M"))
    return "".join(kept) or folded


def stands_in(words: str, text: str) -> bool:
    """Return whether `words` stand in `text` as whole words; in scripts without spaces, anywhere.

    Both must be normalised (scoring/answers.py): "ann" does not stand in "annual".
    """
    return f" {words} " in f" {text} " or (words in text and bool(_UNSPACED.search(words)))


READ = 6  # characters for a token that is wanted; of most texts one has 3 to 5
MARGIN = 200  # tokens beyond those that count
ELSEWHERE = 13  # characters between two ends of a text: groups of 2 or 3 characters end differently there


def start_of(text: str, encode: Callable[[str], list[int]], count: int) -> str:
    """Return a text that begins with the same `count` tokens: `text`, or the start of a much longer one.

    What follows a place can change the tokens before it, but not far before it. So the start has more tokens
    than `count`, and is made twice, with different ends: where that makes a difference, `text` is returned.
    """
    length = READ * (count + MARGIN)
    while 2 * length < len(text):
        start = text[:length]
        ids = encode(start)
        if len(ids) >= count + MARGIN:
            return start if encode(start[:-ELSEWHERE])[:count] == ids[:count] else text
        length *= 4  # long tokens, as of white space
    return text


def markdown_cell(text: str) -> str:
    """Return `text` for a cell of a Markdown table: names are somebody's, none may end it or become HTML."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split("\n"))
