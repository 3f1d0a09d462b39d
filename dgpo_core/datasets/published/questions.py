"""The seven question sets of FlashRAG, with gold contexts, and validation questions held out."""

import hashlib
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from dgpo_core.config.published import PublishedConfig
from dgpo_core.config.questions import QuestionSetsConfig
from dgpo_core.datasets.published.catalogue import QUESTIONS, TEST_SPLITS
from dgpo_core.datasets.published.gold import join, read_musique, read_nq
from dgpo_core.datasets.published.places import Fetched, fetch
from dgpo_core.datasets.records import Question, read_questions
from dgpo_core.errors import UserError
from dgpo_core.text import letters, trimmed

SETTING = "data.published"
Split = tuple[str, str]  # (set, train or test)
GOLD = {"musique": read_musique, "nq": read_nq}  # the sets whose original files are joined


@dataclass(frozen=True)
class QuestionFiles:
    """The files of a run: of each split that is trained or tested on, and with the gold contexts of a set."""

    splits: dict[Split, Fetched]
    gold: dict[str, list[Fetched]]

    @property
    def named(self) -> dict[str, Fetched]:
        """What each file is for -> the file."""
        named = {f"{name}/{split}": file for (name, split), file in self.splits.items()}
        for name, files in self.gold.items():
            named |= {f"{name}/gold/{number}": file for number, file in enumerate(files)}
        return named


def split_places(config: PublishedConfig, sets: QuestionSetsConfig) -> dict[Split, str]:
    """Where the file of each split is that is trained or tested on."""
    names = {(name, "train"): f"{name}/train" for name in sets.train}
    names |= {(name, "test"): f"{name}/{TEST_SPLITS[name]}" for name in sets.test}
    return {split: f"{config.questions.rstrip('/')}/{name}.jsonl" for split, name in names.items()}


def gold_places(config: PublishedConfig, sets: QuestionSetsConfig) -> dict[str, list[str]]:
    """Where the original files are of the sets that are tested on and have any given."""
    places: dict[str, list[str]] = {name: getattr(config, name) for name in GOLD if name in sets.test}
    return {name: listed for name, listed in places.items() if listed}


def fetch_questions(config: PublishedConfig, sets: QuestionSetsConfig) -> QuestionFiles:
    """Raises UserError for a file that does not exist, InfrastructureError when the hub cannot be reached."""
    splits = {
        split: fetch(place, f"{SETTING}.questions") for split, place in split_places(config, sets).items()
    }
    gold = {
        name: [fetch(place, f"{SETTING}.{name}") for place in listed]
        for name, listed in gold_places(config, sets).items()
    }
    return QuestionFiles(splits, gold)


def load_questions(
    config: PublishedConfig, files: QuestionFiles
) -> tuple[dict[Split, list[Question]], dict[str, int]]:
    """(set, split) -> questions, with split train, dev or test; and counts of what was left out or joined.

    FlashRAG's metadata is left out: nothing reads it, and HotpotQA's has ten paragraphs a question. Raises
    UserError with file and line, and for a count that is not the paper's.
    """
    questions: dict[Split, list[Question]] = {}
    counts: dict[str, int] = {}
    for (name, split), file in files.splits.items():
        found = read_questions(file.path, _without_metadata)
        if config.check_counts:
            check_count(f"{name}/{split}", len(found), QUESTIONS[name, split], file.origin)
        found, empty = _without_empty_answers(found)
        counts |= {f"{name}_{split}_empty_answers": empty} if empty else {}
        if split == "train":
            found, questions[name, "dev"] = hold_out(name, found, config.dev_questions)
            questions[name, split] = found[: config.limits.train]
        else:
            questions[name, split] = found[: config.limits.test]
            if name in files.gold:
                questions[name, split], lost = _with_gold(name, questions[name, split], files.gold[name])
                counts |= {f"{name}_gold_{reason}": count for reason, count in lost.items()}
    return questions, counts


def _without_metadata(row: dict[str, Any]) -> Question:
    return replace(Question.from_json(row), metadata={})


def _without_empty_answers(questions: list[Question]) -> tuple[list[Question], int]:
    """The questions without golden answers of white space alone, and how many of these there were."""
    kept = [
        replace(question, golden_answers=tuple(filter(trimmed, question.golden_answers)))
        for question in questions
    ]
    both = zip(questions, kept, strict=True)
    return kept, sum(len(before.golden_answers) - len(after.golden_answers) for before, after in both)


def check_count(what: str, found: int, expected: int, origin: str) -> None:
    """Raises UserError naming set, split, found and expected number when they differ."""
    if found != expected:
        raise UserError(
            f"{origin}: {what} has {found:,} records, but the paper (table 9) has {expected:,}; "
            f"{SETTING}.check_counts: false takes it as it is"
        )


def hold_out(name: str, questions: list[Question], count: int) -> tuple[list[Question], list[Question]]:
    """Return (training, validation questions), in their order: those with the lowest hashes are held out.

    Questions that ask the same (by letters and digits, as gold.py joins) stay together, so `count` is of
    different ones. Raise UserError when nothing would be left to train on.
    """
    asked = [(letters(question.question), question) for question in questions]
    ranks: dict[str, bytes] = {}
    for key, question in asked:
        rank = _rank(name, question.question)
        ranks[key] = min(rank, ranks.get(key, rank))
    held = set(sorted(ranks, key=ranks.__getitem__)[:count])
    if len(held) == len(ranks):
        raise UserError(
            f"{SETTING}.dev_questions: {count} are to be held out of {name}, which has {len(ranks)} questions"
        )
    return (
        [question for key, question in asked if key not in held],
        [question for key, question in asked if key in held],
    )


def _rank(name: str, text: str) -> bytes:
    return hashlib.sha256(f"{name}\n{text}".encode()).digest()


def _with_gold(
    name: str, questions: list[Question], files: list[Fetched]
) -> tuple[list[Question], dict[str, int]]:
    golds = chain.from_iterable(GOLD[name](file.path) for file in files)
    joined = join(questions, golds, ", ".join(file.origin for file in files))
    return joined.questions, joined.counts
