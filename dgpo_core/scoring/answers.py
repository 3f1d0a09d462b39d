"""Answer metrics of open-domain question answering (SQuAD's normalisation, as Search-R1 and FlashRAG)."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SPACE = re.compile(r"\s")
PIECE = 10_000  # characters of a long text that are looked at together


def normalize(text: str) -> str:
    """Lower-case, no punctuation, no articles, single spaces."""
    return _words(_bare(text))


def _bare(text: str) -> str:
    return text.lower().translate(_PUNCTUATION)


def _words(bare: str) -> str:
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str | None, golden_answers: Iterable[str]) -> bool:
    """Whether the normalised prediction equals a normalised golden answer (paper, eq. 3)."""
    if prediction is None:
        return False
    normalized = normalize(prediction)
    return any(normalize(answer) == normalized for answer in golden_answers)


def contains_answer(text: str | None, golden_answers: Iterable[str]) -> bool:
    """Whether a normalised golden answer stands in the normalised text (sub-EM; hit of a passage).

    An answer that normalises to nothing ("The The") stands in nothing but a text that does so too.
    """
    if text is None:
        return False
    bare = _bare(text)
    answers = [normalize(answer) for answer in golden_answers]
    if "" in answers and not any(map(_words, _pieces(bare))):
        return True
    # most of the work is articles and spaces: a long text is spared it as far as the answer is found without
    likely = [answer for answer in answers if answer and all(word in bare for word in answer.split())]
    return bool(likely) and any(answer in part for part in _parts(bare, likely) for answer in likely)


def _parts(bare: str, answers: list[str]) -> Iterator[str]:
    """The words of a text part by part, each with so much of the one before that no answer is cut in two."""
    overlap = max(map(len, answers))
    part = ""
    for piece in _pieces(bare):
        part = " ".join(filter(None, (part[-overlap:], _words(piece))))
        yield part


def _pieces(text: str) -> Iterator[str]:
    """The text cut before white space."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + PIECE)
        end = space.start() if space else len(text)
        yield text[start:end]
        start = end


def token_f1(prediction: str | None, golden_answers: Iterable[str]) -> float:
    """Best F1 over the golden answers, on bags of normalised words; yes/no must match exactly."""
    if prediction is None:
        return 0.0
    return max((_f1(normalize(prediction), normalize(answer)) for answer in golden_answers), default=0.0)


def _f1(prediction: str, answer: str) -> float:
    if {prediction, answer} & {"yes", "no", "noanswer"} and prediction != answer:
        return 0.0
    predicted, golden = prediction.split(), answer.split()
    common = sum((Counter(predicted) & Counter(golden)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(golden)
    return 2 * precision * recall / (precision + recall)
