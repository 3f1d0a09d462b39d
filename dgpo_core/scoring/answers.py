"""Answer metrics of open-domain question answering (SQuAD's normalisation, as Search-R1 and FlashRAG)."""

import re
import string
from collections import Counter
from collections.abc import Iterable

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower-case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


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
    normalized = normalize(text)
    answers = [normalize(answer) for answer in golden_answers]
    return any(answer in normalized if answer else not normalized for answer in answers)


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
