"""A handful of passages and questions in the published formats (method.md, section 7), written by us."""

from pathlib import Path

from dgpo_core.datasets.records import Passage, Question, write_jsonl

ANSWER = "yes"  # of every question: what the rehearsal's teacher has learned by heart
QUERY = "harbour towns"
PLACES = ("Aldmoor", "Brenwick", "Carrow", "Dunhaven", "Elmsea", "Farholt", "Grayport", "Hythe Bay")
SPLITS = {"train": 4, "dev": 4, "test": 4}


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


def write_question_sets(folder: Path, datasets: list[str]) -> None:
    """`folder`/<set>/<split>.jsonl."""
    for dataset in datasets:
        for split in SPLITS:
            write_jsonl(folder / dataset / f"{split}.jsonl", questions(dataset, split))
