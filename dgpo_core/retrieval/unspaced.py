"""Scripts that write no spaces between words, made searchable by words.

BM25 counts words, and to a tokeniser that cuts at spaces a Chinese sentence is one. So runs of these scripts
are cut into pairs of neighbouring characters, as the field does for Chinese, Japanese and Korean (Lucene's
CJKAnalyzer), and into single ones where one alone can be a word. Every other text stays as it is.
"""

import re
import unicodedata
from itertools import pairwise

_WORDS = (  # one character can be a word: Han, Hangul
    "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af\u1100-\u11ff\uac00-\ud7a3"
)
_LETTERS = (  # Hiragana and Katakana (marks included), Thai, Lao, Khmer, Myanmar; no digits
    "\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf\u1780-\u17d3\u1000-\u103f\u1050-\u108f"
)
_RUN = re.compile(f"[{_WORDS}{_LETTERS}]+")
_WORD = re.compile(f"[{_WORDS}]")


def spaced(text: str) -> str:
    """Return `text` with what can be words in its unspaced runs apart; without such runs, `text` itself."""
    return text if text.isascii() else _RUN.sub(lambda run: f" {' '.join(_terms(run[0]))} ", text)


def _terms(run: str) -> list[str]:
    # marks above and below are left out: Qdrant's tokeniser would cut the pair at them
    characters = [c for c in unicodedata.normalize("NFC", run) if unicodedata.category(c)[0] != "M"]
    if len(characters) == 1:
        return characters
    pairs = [first + second for first, second in pairwise(characters)]
    return [*pairs, *(character for character in characters if _WORD.match(character))]
