"""A handful of passages and questions in the published formats (docs/data.md), written by us."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dgpo_core.datasets.published.catalogue import TEST_SPLITS
from dgpo_core.datasets.records import Passage, Question, write_jsonl

ANSWER = "yes"  # of every question: what the rehearsal's teacher has learned by heart
QUERY = "harbour towns"
PLACES = ("Aldmoor", "Brenwick", "Carrow", "Dunhaven", "Elmsea", "Farholt", "Grayport", "Hythe Bay")
SPLITS = {"train": 8, "dev": 4, "test": 4}


def passages() -> list[Passage]:
    """One for each place, with the title in quotes and the text below it, as wiki-18 has them."""
    return [
        Passage(
            str(number),
            place,
            f"{place} is a harbour town. Its lighthouse was built in {1840 + 7 * number}, yes.",
        )
        for number, place in enumerate(PLACES)
    ]


def questions(dataset: str, split: str) -> list[Question]:
    """With the metadata that ARCap looks for: golden passages and a long answer."""
    found = passages()
    made = []
    for number in range(SPLITS[split]):
        passage = found[(number + len(dataset)) % len(found)]
        metadata = {
            "golden_passages": [{"id": passage.id, "title": passage.title, "text": passage.text}],
            "long_answer": passage.text,
        }
        text = f"Is {passage.title} a harbour town with a lighthouse ({split} {number})"
        made.append(Question(f"{split}_{number}", text, (ANSWER,), metadata))
    return made


def write_corpus(path: Path) -> None:
    write_jsonl(path, passages())


def write_question_sets(folder: Path, datasets: Iterable[str]) -> None:
    """`folder`/<set>/<split>.jsonl, as the stage `data` leaves them."""
    for dataset in datasets:
        for split in SPLITS:
            write_jsonl(folder / dataset / f"{split}.jsonl", questions(dataset, split))


def write_published(folder: Path, train: Iterable[str], test: Iterable[str]) -> None:
    """What the stage `data` reads: FlashRAG's question sets, wiki-18, MuSiQue's and NQ's own files."""
    write_corpus(folder / "corpus.jsonl")
    for dataset in train:
        write_jsonl(folder / "questions" / dataset / "train.jsonl", questions(dataset, "train"))
    for dataset in test:
        file = folder / "questions" / dataset / f"{TEST_SPLITS[dataset]}.jsonl"
        write_jsonl(file, questions(dataset, "test"))
    _write_rows(folder / "musique.jsonl", map(_of_musique, questions("musique", "test")))
    _write_rows(folder / "nq.jsonl", map(_of_nq, questions("nq", "test")))


def _of_musique(question: Question) -> dict[str, Any]:
    (passage,) = question.metadata["golden_passages"]
    paragraph = {"title": passage["title"], "paragraph_text": passage["text"], "is_supporting": True}
    return {
        "question": question.question,
        "paragraphs": [paragraph],
        "answer": ANSWER,
        "answer_aliases": [],
    }


def _of_nq(question: Question) -> dict[str, Any]:
    """The simplified form: the page's words, of which the last one is the short answer."""
    (passage,) = question.metadata["golden_passages"]
    words = passage["text"].split(" ")
    span = {"start_token": 0, "end_token": len(words)}
    short = {"start_token": len(words) - 1, "end_token": len(words)}
    annotation = {"long_answer": span, "short_answers": [short], "yes_no_answer": "NONE"}
    return {
        "question_text": question.question,
        "document_text": passage["text"],
        "annotations": [annotation],
    }


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
