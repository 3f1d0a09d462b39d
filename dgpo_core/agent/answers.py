"""Answer metrics of open-domain question answering (SQuAD's normalisation, as Search-R1 and FlashRAG).

Texts are compared in one Unicode spelling (dgpo_core/text.py), which SQuAD's rule leaves open.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from dgpo_core.text import canonical, lower_unpunctuated, normalize, without_articles

_SPACE = re.compile(r"\s")
PIECE = 10_000  # characters of a long text that are looked at together


def comparable(text: str) -> str:
    """Return `text` normalised or, where that leaves nothing ("A", "?", "The The"), in lower case alone.

    Empty for a text of white space only: that is no answer.
    """
    return normalize(text) or " ".join(canonical(text).lower().split())


def exact_match(prediction: str | None, golden_answers: Iterable[str]) -> bool:
    """Return whether the prediction equals a golden answer, both normalised (paper, eq. 3).

    An answer that normalises to nothing equals only itself, and an empty one nothing.
    """
    wanted = comparable(prediction or "")
    return bool(wanted) and any(comparable(answer) == wanted for answer in golden_answers)


def contains_answer(text: str | None, golden_answers: Iterable[str]) -> bool:
    """Return whether a normalised golden answer stands in the normalised text (sub-EM; hit of a passage).

    An answer that normalises to nothing ("The The") stands in nothing but itself.
    """
    if text is None:
        return False
    bare = lower_unpunctuated(text)
    if not any(map(without_articles, _pieces(bare))):
        return exact_match(text, golden_answers)
    answers = filter(None, map(normalize, golden_answers))
    # most of the work is articles and spaces: a long text is spared it as far as the answer is found without
    likely = [answer for answer in answers if all(word in bare for word in answer.split())]
    return bool(likely) and any(answer in part for part in _parts(bare, likely) for answer in likely)


def _parts(bare: str, answers: list[str]) -> Iterator[str]:
    """Yield the words of a text in parts that overlap so far that no answer is cut in two."""
    overlap = max(map(len, answers))
    part = ""
    for piece in _pieces(bare):
        part = " ".join(filter(None, (part[-overlap:], without_articles(piece))))
        yield part


def _pieces(text: str) -> Iterator[str]:
    """Yield the text cut before white space."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + PIECE)
        end = space.start() if space else len(text)
        yield text[start:end]
        start = end


def token_f1(prediction: str | None, golden_answers: Iterable[str]) -> float:
    """Return the best F1 over the golden answers, on bags of normalised words; yes/no must match exactly."""
    wanted = comparable(prediction or "")
    return max((_f1(wanted, comparable(answer)) for answer in golden_answers), default=0.0)


def _f1(prediction: str, answer: str) -> float:
    if {prediction, answer} & {"yes", "no", "noanswer"} and prediction != answer:
        return 0.0
    predicted, golden = prediction.split(), answer.split()
    common = sum((Counter(predicted) & Counter(golden)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(golden)
    return 2 * precision * recall / (precision + recall)
