"""Texts of every script: what of them can be seen, how they are compared, and where their words are.

`canonical` gives a text one spelling, `normalize` follows SQuAD's rule for answers, and `letters` leaves only
what tells two questions apart. `spaced` makes scripts without spaces searchable by words.
"""

import re
import string
import unicodedata
from collections.abc import Callable
from itertools import pairwise


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
_without_punctuation = remover(re.escape(string.punctuation))
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Thai, Lao, Burmese, Khmer, Japanese and Chinese put no space between words.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")

# What `spaced` cuts: characters that can be words alone (Han, Hangul) ...
_WORDS = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af\u1100-\u11ff\uac00-\ud7a3"
# ... and letters: Hiragana and Katakana (marks included), Thai, Lao, Khmer, Myanmar; no digits.
_LETTERS = (
    "\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf\u1780-\u17d3\u1000-\u103f\u1050-\u108f"
)
_RUN = re.compile(f"[{_WORDS}{_LETTERS}]+")
_WORD = re.compile(f"[{_WORDS}]")

# How `start_of` reads a long text.
READ = 6  # characters for a token that is wanted; of most texts one has 3 to 5
MARGIN = 200  # tokens beyond those that count
ELSEWHERE = 13  # characters between two ends of a text: groups of 2 or 3 characters end differently there


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


def normalize(text: str) -> str:
    """Return `text` by SQuAD's rule: lower case, no punctuation or articles, single spaces, one spelling."""
    return without_articles(lower_unpunctuated(text))


def lower_unpunctuated(text: str) -> str:
    """Return `text` in lower case, without punctuation, in one spelling: the first half of `normalize`."""
    bare = _without_punctuation(canonical(text).lower())
    return unicodedata.normalize("NFC", bare)  # what stood apart may stand together now


def without_articles(text: str) -> str:
    """Return the words of `text` without articles, with single spaces: the second half of `normalize`."""
    return " ".join(_ARTICLES.sub(" ", text).split())


def stands_in(words: str, text: str) -> bool:
    """Return whether `words` stand in `text` as whole words; in scripts without spaces, anywhere.

    Both must be normalised: "ann" does not stand in "annual".
    """
    return f" {words} " in f" {text} " or (words in text and bool(_UNSPACED.search(words)))


def spaced(text: str) -> str:
    """Return `text` with spaces between what can be words in scripts without spaces; otherwise `text` itself.

    Runs of these scripts become pairs of neighbouring characters, as the field does for Chinese, Japanese and
    Korean (Lucene's CJKAnalyzer), and single ones where one alone can be a word.
    """
    return text if text.isascii() else _RUN.sub(lambda run: f" {' '.join(_terms(run[0]))} ", text)


def _terms(run: str) -> list[str]:
    # marks above and below are left out: Qdrant's tokeniser would cut the pair at them
    characters = [c for c in unicodedata.normalize("NFC", run) if unicodedata.category(c)[0] != "M"]
    if len(characters) == 1:
        return characters
    pairs = [first + second for first, second in pairwise(characters)]
    return [*pairs, *(character for character in characters if _WORD.match(character))]


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
    """Return `text` escaped for a cell of a Markdown table: no name may end the cell or become HTML."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split("\n"))
