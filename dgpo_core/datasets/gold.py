"""Gold contexts from the original files of MuSiQue and NQ, joined to FlashRAG's questions.

FlashRAG numbers its questions anew, so they are joined by what they ask: the question's letters and digits,
whatever its case, spaces and punctuation; and a golden answer must be shared, compared in the same way. A
question that finds no partner, or several that differ, gets no gold context, and is counted.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgpo_core.datasets.records import Question, read_jsonl
from dgpo_core.errors import UserError
from dgpo_core.text import letters

TAG = re.compile(r"<[^>]+>")  # a token of HTML in NQ's simplified form
TYPES = {str: "a string", int: "an integer", bool: "true or false", dict: "an object"}


@dataclass(frozen=True)
class Gold:
    """A question in an original file; `metadata` is empty where the annotators found no gold context."""

    question: str
    answers: tuple[str, ...]
    metadata: dict[str, Any]


def add_gold(
    questions: Sequence[Question], golds: Iterable[Gold], origins: str
) -> tuple[list[Question], dict[str, int]]:
    """Give each question the metadata of its partner; memory holds partners only.

    Returns the questions in their order, and counts: how many got a gold context, and why the others did not.
    Raises UserError naming `origins` when not a single question has a partner.
    """
    wanted = {letters(question.question) for question in questions}
    partners: dict[str, list[Gold]] = defaultdict(list)
    for gold in golds:
        if (key := letters(gold.question)) in wanted:
            partners[key].append(gold)
    joined = []
    counts = dict.fromkeys(("joined", "not_found", "other_answer", "no_gold", "ambiguous"), 0)
    for question in questions:
        verdict, metadata = _partner(question, partners[letters(question.question)])
        counts[verdict] += 1
        joined.append(replace(question, metadata={**question.metadata, **metadata}))
    if not counts["joined"]:
        raise UserError(f"{origins}: has a gold context for none of {len(questions)} questions: {counts}")
    return joined, counts


def _partner(question: Question, candidates: list[Gold]) -> tuple[str, dict[str, Any]]:
    if not candidates:
        return "not_found", {}
    known = [gold for gold in candidates if gold.metadata]
    if not known:
        return "no_gold", {}
    golden = {letters(answer) for answer in question.golden_answers}
    sharing = [gold.metadata for gold in known if golden & {letters(answer) for answer in gold.answers}]
    if not sharing:
        return "other_answer", {}
    return ("joined", sharing[0]) if all(other == sharing[0] for other in sharing) else ("ambiguous", {})


def read_musique(path: Path) -> Iterator[Gold]:
    """Read MuSiQue's own file: supporting paragraphs in their order. Raises UserError with file and line."""
    return read_jsonl(path, _musique)


def _musique(row: dict[str, Any]) -> Gold:
    passages = [
        {"title": _typed(paragraph, "title", str), "text": _typed(paragraph, "paragraph_text", str)}
        for paragraph in _objects(row, "paragraphs")
        if _typed(paragraph, "is_supporting", bool)
    ]
    aliases = row.get("answer_aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError('key "answer_aliases" must be a list of strings')
    answers = (_typed(row, "answer", str), *aliases)
    return Gold(_typed(row, "question", str), answers, {"golden_passages": passages} if passages else {})


def read_nq(path: Path) -> Iterator[Gold]:
    """Read NQ's own file, in its original form or the simplified one. Raises UserError with file and line.

    Long answers of annotators who also gave a short one come first, then those that more annotators chose.
    """
    return read_jsonl(path, _natural_question)


def _natural_question(row: dict[str, Any]) -> Gold:
    tokens = _tokens(row)
    answers: list[str] = []
    votes: Counter[tuple[int, int]] = Counter()
    short: set[tuple[int, int]] = set()
    for annotation in _objects(row, "annotations"):
        spans = [_span(answer) for answer in _objects(annotation, "short_answers")]
        answers += [_text(tokens, span) for span in spans]
        if annotation.get("yes_no_answer") in ("YES", "NO"):
            answers.append(annotation["yes_no_answer"])
        long_answer = _span(_typed(annotation, "long_answer", dict))
        if long_answer[0] >= 0:
            votes[long_answer] += 1
            if spans:
                short.add(long_answer)
    ranked = sorted(votes, key=lambda span: (span not in short, -votes[span]))  # stable: then by annotator
    texts = list(dict.fromkeys(text for span in ranked if (text := _text(tokens, span))))
    title = row.get("document_title", "")  # the simplified form has none
    passages = [{"title": title, "text": text} for text in texts[:1]]
    metadata = {"golden_passages": passages, "long_answers": texts} if texts else {}
    return Gold(_typed(row, "question_text", str), tuple(answers), metadata)


def _tokens(row: dict[str, Any]) -> list[Any]:
    """Return the page's tokens; None for those of HTML, which are part of no text."""
    if "document_tokens" not in row:
        text: str = _typed(row, "document_text", str)
        return [None if TAG.fullmatch(token) else token for token in text.split(" ")]
    try:
        return [None if token["html_token"] else token["token"] for token in _objects(row, "document_tokens")]
    except KeyError as error:
        raise ValueError(f'key "document_tokens": a token has no {error}') from None


def _text(tokens: list[Any], span: tuple[int, int]) -> str:
    start, end = span
    if not 0 <= start <= end <= len(tokens):
        raise ValueError(f"an answer of tokens {start} to {end} in a document of {len(tokens)}")
    words = [token for token in tokens[start:end] if token is not None]
    if not all(isinstance(word, str) for word in words):
        raise ValueError('key "document_tokens": each "token" must be a string')
    return " ".join(words)


def _span(answer: dict[str, Any]) -> tuple[int, int]:
    return _typed(answer, "start_token", int), _typed(answer, "end_token", int)


def _typed(row: dict[str, Any], key: str, kind: type) -> Any:
    value = row.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f'key "{key}" must be {TYPES[kind]}')
    return value


def _objects(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f'key "{key}" must be a list of objects')
    return value
