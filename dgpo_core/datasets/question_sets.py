"""Your own question sets: their files, and splits made from a seed where a set comes as one list."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from dgpo_core.config.data import QuestionFilesConfig, QuestionSetsConfig
from dgpo_core.datasets.audit import answer_entities
from dgpo_core.datasets.documents import find_documents
from dgpo_core.datasets.question_files import QuestionForm, read_question_files
from dgpo_core.datasets.records import Question
from dgpo_core.errors import UserError
from dgpo_core.text import letters

SETTING = "data.files.questions"  # where params.yaml names the sets
Splits = dict[tuple[str, str], list[Question]]  # (set, train, dev or test) -> questions


def find_question_files(
    sets: Mapping[str, QuestionFilesConfig], wanted: QuestionSetsConfig
) -> dict[tuple[str, str], list[Path]]:
    """Return the files of each (set, train, dev, test or all) that is trained or tested on.

    Raise UserError for a path or pattern that no file has, and for a set that lacks what it is wanted for.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    for name in dict.fromkeys((*wanted.train, *wanted.test)):
        config = sets[name]
        for part in ("all", *_parts(name, wanted)):
            if patterns := getattr(config, part):
                found[name, part] = find_documents(patterns, f"{SETTING}.{name}.{part}")
        for part, names in (("train", wanted.train), ("test", wanted.test)):
            if name in names and not {(name, "all"), (name, part)} & found.keys():
                raise UserError(f"{SETTING}.{name}: questions.{part} names it, but it has no files of {part}")
    return found


def _parts(name: str, wanted: QuestionSetsConfig) -> list[str]:
    """Return the splits of a set that are used."""
    return [*(("train", "dev") if name in wanted.train else ()), *(("test",) if name in wanted.test else ())]


def load_question_sets(
    sets: Mapping[str, QuestionFilesConfig],
    wanted: QuestionSetsConfig,
    files: Mapping[tuple[str, str], Sequence[Path]],
) -> tuple[Splits, list[str]]:
    """Read and split what is trained or tested on; return it, and what a person should know.

    A set that is trained on and has no validation questions gets some out of its training questions.
    """
    splits: Splits = {}
    told: list[str] = []
    for name in dict.fromkeys((*wanted.train, *wanted.test)):
        config = sets[name]
        form = QuestionForm(config.columns, config.duplicate_ids == "rename")
        own: dict[str, list[Question]] = {}
        for part in (part for owner, part in files if owner == name):
            own[part], said = read_question_files(name, files[name, part], form)
            told += [f"{part} of {line}" for line in said]
        if "all" in own:
            shares = {"dev": config.split.dev, "test": config.split.test}
            own = split_questions(name, own["all"], shares, config.split.seed, config.disjoint)
        elif name in wanted.train and "dev" not in own:
            own |= split_questions(
                name, own["train"], {"dev": config.split.dev}, config.split.seed, config.disjoint
            )
        splits |= {(name, part): own[part] for part in _parts(name, wanted)}
    return splits, told


def split_questions(
    name: str, questions: Sequence[Question], shares: Mapping[str, float], seed: int, disjoint: str
) -> dict[str, list[Question]]:
    """Return {split: its questions, in their order}, `train` with what the `shares` of the others leave.

    Questions that ask the same (by letters and digits) stay together; with `disjoint` "answer" also those
    that share a normalised golden answer, yes and no apart. Groups are dealt in the order of their hashes,
    so that the order of the files decides nothing. Raise UserError when a split gets nothing.
    """
    groups = sorted(_groups(questions, disjoint), key=lambda group: _rank(seed, name, questions, group))
    room = {split: max(1, round(share * len(questions))) for split, share in shares.items() if share}
    places: dict[int, str] = {}
    for group in groups:
        split = next((split for split, left in room.items() if len(group) <= left), "train")
        places |= dict.fromkeys(group, split)
        if split != "train":
            room[split] -= len(group)
    found: dict[str, list[Question]] = {split: [] for split in ("train", *shares)}
    for place, question in enumerate(questions):
        found[places[place]].append(question)
    if empty := [split for split, own in found.items() if not own]:
        raise UserError(
            f"{SETTING}.{name}: {len(questions)} questions in {len(groups)} groups that must stay together: "
            f"too few for a share of {empty[0]}"
        )
    return found


def _groups(questions: Sequence[Question], disjoint: str) -> list[list[int]]:
    """Return the places of questions that must stay together: the components that shared keys make."""
    parents = list(range(len(questions)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = place = parents[parents[place]]
        return place

    first: dict[tuple[str, str], int] = {}
    for place, question in enumerate(questions):
        keys = [("question", letters(question.question))]
        if disjoint == "answer":
            keys += [("answer", each) for each in answer_entities(question)]
        for key in keys:
            parents[root(place)] = root(first.setdefault(key, place))
    groups: dict[int, list[int]] = defaultdict(list)
    for place in range(len(questions)):
        groups[root(place)].append(place)
    return list(groups.values())


def _rank(seed: int, name: str, questions: Sequence[Question], group: Sequence[int]) -> bytes:
    return min(
        hashlib.sha256(f"{seed}\n{name}\n{letters(questions[place].question)}".encode()).digest()
        for place in group
    )
