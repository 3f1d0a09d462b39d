"""Which files hold the paper's questions, and how many there must be (paper, table 9).

Where a published file is: on this machine, or on the Hugging Face hub, which is asked for it once.

The seven question sets of FlashRAG, with gold contexts, and validation questions held out.

wiki-18, or a corpus in its format, from a plain or gzipped file: one passage at a time.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dgpo_core.config.data import PublishedConfig, QuestionSetsConfig
from dgpo_core.datasets.gold import join, read_musique, read_nq
from dgpo_core.datasets.records import Passage, Question, read_corpus, read_questions
from dgpo_core.errors import InfrastructureError, UserError, first_line
from dgpo_core.files import replacement
from dgpo_core.hub import HTTP_ERROR
from dgpo_core.text import letters, trimmed

# the split of FlashRAG's that the paper tests on
TEST_SPLITS = {
    "nq": "test",
    "triviaqa": "test",
    "popqa": "test",
    "hotpotqa": "dev",
    "2wikimultihopqa": "dev",
    "musique": "dev",
    "bamboogle": "test",
}
QUESTIONS = {
    ("nq", "train"): 79_168,
    ("hotpotqa", "train"): 90_447,
    ("nq", "test"): 3_610,
    ("triviaqa", "test"): 11_313,
    ("popqa", "test"): 14_267,
    ("hotpotqa", "test"): 7_405,
    ("2wikimultihopqa", "test"): 12_576,
    ("musique", "test"): 2_417,
    ("bamboogle", "test"): 125,
}
PASSAGES = 21_015_324  # of wiki-18


SCHEME = "hf://"
_HUB = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


@dataclass(frozen=True)
class Fetched:
    """`path` is the file on this machine, `origin` where it came from: on the hub with the commit."""

    path: Path
    origin: str


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the hub; `revision` None is the newest."""

    repository: str
    file: str
    revision: str | None


def hub_file(place: str, setting: str) -> HubFile | None:
    """What `hf://datasets/<owner>/<name>[@<revision>]/<path>` names; None for a path on this machine.

    Raises UserError naming `setting` for what is neither.
    """
    if not place.startswith(SCHEME):
        return None
    if not (match := _HUB.fullmatch(place)):
        raise UserError(f"{setting}: {place}: must be hf://datasets/<owner>/<name>[@<revision>]/<path>")
    return HubFile(match["repository"], match["file"], match["revision"])


def fetch(place: str, setting: str) -> Fetched:
    """The file at `place`, as `hub_file` reads it.

    What is on the hub goes to the hub's own cache (HF_HOME), is there for the next time, and a broken
    download continues. Raises UserError naming `setting` when there is no such file, InfrastructureError
    when the hub cannot be reached.
    """
    wanted = hub_file(place, setting)
    if wanted is None:
        path = Path(place)
        if not path.is_file():
            raise UserError(f"{setting}: {place}: no such file")
        return Fetched(path, place)
    repository, file = wanted.repository, wanted.file
    try:
        path = Path(hf_hub_download(repository, file, repo_type="dataset", revision=wanted.revision))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(f"{setting}: {place}: {first_line(error)}") from error
    except LocalEntryNotFoundError as error:  # not in the cache, and no answer from the hub
        raise InfrastructureError(f"{setting}: {place}: cannot reach the hub: {first_line(error)}") from error
    except EntryNotFoundError as error:
        raise UserError(f"{setting}: {place}: no such file there: {first_line(error)}") from error
    except (HTTP_ERROR, OSError, RuntimeError) as error:  # RuntimeError: the hub's storage Xet
        raise InfrastructureError(f"{setting}: {place}: the download failed: {first_line(error)}") from error
    return Fetched(path, f"{SCHEME}datasets/{repository}@{_commit(path)}/{file}")


def _commit(path: Path) -> str:
    """The hub's cache keeps a file below datasets--<owner>--<name>/snapshots/<commit>/."""
    cached = max(place for place, part in enumerate(path.parts) if part.startswith("datasets--"))
    return path.parts[cached + 2]


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


REPORT_EVERY = 20_000


def write_corpus(
    config: PublishedConfig,
    source: Fetched,
    target: Path,
    progress: Callable[[int, int], None],
    read: Callable[[Passage], None] = lambda _: None,
) -> int:
    """Check every line of `source` and write it to `target`, which appears complete; the number of passages.

    Memory does not grow with wiki-18's size. `progress` gets (passages so far, expected), `read` each
    passage. Raises UserError with file and line, and for a count that is not the paper's.
    """
    limit = config.limits.passages
    count = 0
    with replacement(target) as part:
        with part.open("w", encoding="utf-8") as file:
            for count, passage in enumerate(itertools.islice(read_corpus(source.path), limit), 1):
                file.write(json.dumps(passage.to_json(), ensure_ascii=False) + "\n")
                read(passage)
                if count % REPORT_EVERY == 0:
                    progress(count, limit or PASSAGES)
        if not count:
            raise UserError(f"{source.origin}: no passages in this file")
        if config.check_counts and count != limit:
            check_count("the corpus", count, PASSAGES, source.origin)
        progress(count, count)
    return count
