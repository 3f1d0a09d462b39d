"""The published data sets: the paper's seven question sets and wiki-18, or files in their formats.

Files are on this machine or on the Hugging Face hub. Questions come from FlashRAG, and validation questions
are held out of the training sets. A corpus is read one passage at a time, plain or gzipped.

Gold contexts come from the original files of MuSiQue and NQ. FlashRAG numbers its questions anew, so they are
joined by what they ask: the question's letters and digits, whatever its case, spaces and punctuation; and a
golden answer must be shared, compared in the same way. A question that finds no partner, or several that
differ, gets no gold context, and is counted.
"""

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import HfUri, hf_hub_download, parse_hf_uri
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfUriError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dgpo_core.config.data import PublishedConfig, QuestionSetsConfig
from dgpo_core.datasets.records import Question, read_corpus, read_jsonl, read_questions
from dgpo_core.errors import InfrastructureError, UserError, first_line
from dgpo_core.files import replacement
from dgpo_core.hub import HTTP_ERROR
from dgpo_core.text import letters, trimmed

# The catalogue: how many questions each set has (paper, table 9), and which split of FlashRAG's is tested on.
TRAIN_QUESTIONS = {"nq": 79_168, "hotpotqa": 90_447}
TEST_QUESTIONS = {
    "nq": 3_610,
    "triviaqa": 11_313,
    "popqa": 14_267,
    "hotpotqa": 7_405,
    "2wikimultihopqa": 12_576,
    "musique": 2_417,
    "bamboogle": 125,
}
TEST_SPLITS = dict.fromkeys(TEST_QUESTIONS, "test") | dict.fromkeys(
    ("hotpotqa", "2wikimultihopqa", "musique"), "dev"
)
PASSAGES = 21_015_324  # of wiki-18

SETTING = "data.published"  # where params.yaml names the files
HUB = "hf://"
OWN_FILES = "your own documents and questions need data.source: files (docs/data.md)"
TAG = re.compile(r"<[^>]+>")  # a token of HTML in NQ's simplified form
TYPES = {str: "a string", int: "an integer", bool: "true or false", dict: "an object"}
REPORT_EVERY = 20_000  # passages
Split = tuple[str, str]  # (set, train or test)


@dataclass(frozen=True)
class DataFile:
    """A file on this machine; `origin` says where it came from: on the hub with the commit."""

    path: Path
    origin: str


def hub_file(address: str, setting: str) -> HfUri | None:
    """Parse `hf://datasets/<owner>/<name>[@<revision>]/<path>`; None for a path on this machine.

    Raises UserError naming `setting` for what is neither.
    """
    if not address.startswith(HUB):
        return None
    try:
        parsed = parse_hf_uri(address)
    except HfUriError:
        parsed = None
    if parsed is None or parsed.type != "dataset" or not parsed.path_in_repo:
        raise UserError(f"{setting}: {address}: must be hf://datasets/<owner>/<name>[@<revision>]/<path>")
    return parsed


def fetch(address: str, setting: str) -> DataFile:
    """Return the file at `address`, a path or an address on the hub, which is downloaded once.

    Downloads go to the hub's own cache (HF_HOME), and broken ones continue. Raises UserError naming `setting`
    when there is no such file, InfrastructureError when the hub cannot be reached.
    """
    wanted = hub_file(address, setting)
    if wanted is None:
        if not Path(address).is_file():
            found = "a folder, but a file is wanted" if Path(address).is_dir() else "no such file"
            raise UserError(f"{setting}: {address}: {found}; {OWN_FILES}")
        return DataFile(Path(address), address)
    where = f"{setting}: {address}"
    try:
        path = hf_hub_download(wanted.id, wanted.path_in_repo, repo_type="dataset", revision=wanted.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(f"{where}: {first_line(error)}") from error
    except LocalEntryNotFoundError as error:  # not in the cache, and no answer from the hub
        raise InfrastructureError(f"{where}: cannot reach the hub: {first_line(error)}") from error
    except EntryNotFoundError as error:
        raise UserError(f"{where}: no such file there: {first_line(error)}") from error
    except (HTTP_ERROR, OSError, RuntimeError) as error:  # RuntimeError: the hub's storage Xet
        raise InfrastructureError(f"{where}: the download failed: {first_line(error)}") from error
    return DataFile(Path(path), f"{HUB}datasets/{wanted.id}@{_commit(Path(path))}/{wanted.path_in_repo}")


def _commit(path: Path) -> str:
    """Read the commit from a path in the hub's cache: .../datasets--<owner>--<name>/snapshots/<commit>/..."""
    cached = max(number for number, part in enumerate(path.parts) if part.startswith("datasets--"))
    return path.parts[cached + 2]


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


def musique_gold(row: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a row's supporting paragraphs. Raise ValueError naming the key at fault."""
    passages = [
        {"title": _typed(paragraph, "title", str), "text": _typed(paragraph, "paragraph_text", str)}
        for paragraph in _objects(row, "paragraphs")
        if _typed(paragraph, "is_supporting", bool)
    ]
    return {"golden_passages": passages} if passages else {}


def _musique(row: dict[str, Any]) -> Gold:
    aliases = row.get("answer_aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError('key "answer_aliases" must be a list of strings')
    answers = (_typed(row, "answer", str), *aliases)
    return Gold(_typed(row, "question", str), answers, musique_gold(row))


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


GOLD = {"musique": read_musique, "nq": read_nq}  # the sets whose original files are read for gold contexts


@dataclass(frozen=True)
class QuestionFiles:
    """The files of a run: one for each split that is trained or tested on, and the original files of sets."""

    splits: dict[Split, DataFile]
    gold: dict[str, list[DataFile]]

    @property
    def named(self) -> dict[str, DataFile]:
        """Return all files by what they are for."""
        named = {f"{name}/{split}": file for (name, split), file in self.splits.items()}
        for name, files in self.gold.items():
            named |= {f"{name}/gold/{number}": file for number, file in enumerate(files)}
        return named


def split_addresses(config: PublishedConfig, sets: QuestionSetsConfig) -> dict[Split, str]:
    """Return the address of each split's file that is trained or tested on."""
    names = {(name, "train"): f"{name}/train" for name in sets.train}
    names |= {(name, "test"): f"{name}/{TEST_SPLITS[name]}" for name in sets.test}
    return {split: f"{config.questions.rstrip('/')}/{name}.jsonl" for split, name in names.items()}


def gold_addresses(config: PublishedConfig, sets: QuestionSetsConfig) -> dict[str, list[str]]:
    """Return the addresses of the original files that are given for tested sets."""
    addresses: dict[str, list[str]] = {name: getattr(config, name) for name in GOLD if name in sets.test}
    return {name: listed for name, listed in addresses.items() if listed}


def fetch_questions(config: PublishedConfig, sets: QuestionSetsConfig) -> QuestionFiles:
    """Fetch all files of questions. Raises as `fetch` does."""
    splits = {
        split: fetch(address, f"{SETTING}.questions")
        for split, address in split_addresses(config, sets).items()
    }
    gold = {
        name: [fetch(address, f"{SETTING}.{name}") for address in listed]
        for name, listed in gold_addresses(config, sets).items()
    }
    return QuestionFiles(splits, gold)


def load_questions(
    config: PublishedConfig, files: QuestionFiles
) -> tuple[dict[Split, list[Question]], dict[str, int]]:
    """Read the questions by (set, split: train, dev or test), and count what was left out or joined.

    FlashRAG's metadata is left out: nothing reads it, and HotpotQA's has ten paragraphs a question. Raises
    UserError with file and line, and for a count that is not the paper's.
    """
    questions: dict[Split, list[Question]] = {}
    counts: dict[str, int] = {}
    for (name, split), file in files.splits.items():
        found = read_questions(file.path, _without_metadata)
        if config.check_counts:
            expected = (TRAIN_QUESTIONS if split == "train" else TEST_QUESTIONS)[name]
            _check_count(f"{name}/{split}", len(found), expected, file.origin)
        found, empty = _without_empty_answers(found)
        counts |= {f"{name}_{split}_empty_answers": empty} if empty else {}
        if split == "train":
            found, questions[name, "dev"] = hold_out(name, found, config.dev_questions)
            questions[name, split] = found[: config.limits.train]
        else:
            questions[name, split] = found[: config.limits.test]
            if name in files.gold:
                golds = chain.from_iterable(GOLD[name](part.path) for part in files.gold[name])
                origins = ", ".join(part.origin for part in files.gold[name])
                questions[name, split], reasons = add_gold(questions[name, split], golds, origins)
                counts |= {f"{name}_gold_{reason}": count for reason, count in reasons.items()}
    return questions, counts


def _without_metadata(row: dict[str, Any]) -> Question:
    return replace(Question.from_json(row), metadata={})


def _without_empty_answers(questions: list[Question]) -> tuple[list[Question], int]:
    """Drop golden answers of white space alone; return the questions, and how many answers were dropped."""
    kept = [
        replace(question, golden_answers=tuple(filter(trimmed, question.golden_answers)))
        for question in questions
    ]
    both = zip(questions, kept, strict=True)
    return kept, sum(len(before.golden_answers) - len(after.golden_answers) for before, after in both)


def _check_count(what: str, found: int, expected: int, origin: str) -> None:
    """Raise UserError naming set, split, found and expected number when they differ."""
    if found != expected:
        raise UserError(
            f"{origin}: {what} has {found:,} records, but the paper (table 9) has {expected:,}; "
            f"{SETTING}.check_counts: false takes it as it is"
        )


def hold_out(name: str, questions: list[Question], count: int) -> tuple[list[Question], list[Question]]:
    """Return (training, validation questions), in their order: those with the lowest hashes are held out.

    Questions that ask the same (by letters and digits) stay together, so `count` is of
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


def write_corpus(
    config: PublishedConfig,
    source: DataFile,
    target: Path,
    progress: Callable[[int, int], None],
) -> int:
    """Check every line of `source`, write it to `target`, which appears complete, and count the passages.

    Memory does not grow with wiki-18's size. `progress` gets (passages so far, expected). Raises UserError
    with file and line, and for a count that is not the paper's.
    """
    limit = config.limits.passages
    count = 0
    with replacement(target) as part:
        with part.open("w", encoding="utf-8") as file:
            for count, passage in enumerate(itertools.islice(read_corpus(source.path), limit), 1):
                file.write(json.dumps(passage.to_json(), ensure_ascii=False) + "\n")
                if count % REPORT_EVERY == 0:
                    progress(count, limit or PASSAGES)
        if not count:
            raise UserError(f"{source.origin}: no passages in this file")
        if config.check_counts and count != limit:
            _check_count("the corpus", count, PASSAGES, source.origin)
        progress(count, count)
    return count
