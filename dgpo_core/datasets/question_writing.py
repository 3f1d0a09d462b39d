"""Questions that a model writes from a corpus: of one passage, or of two of which one names the other.

Every attempt is judged, in part by the same model, and kept in a file, so that what was paid for is never
asked again. What is left does not depend on where a run was killed: passages are drawn in a seeded order, and
the first questions in that order count.
"""

import hashlib
import json
import math
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from dgpo_core.datasets.records import Passage, Question, read_lines
from dgpo_core.endpoint import Reply
from dgpo_core.errors import UserError
from dgpo_core.text import normalize, stands_in, trimmed

SHORTEST = 20  # words of a passage that is worth a question
SHORTEST_TITLE = 5  # characters of a title that is looked for in other passages
LONGEST_TITLE = 3  # words, likewise
COPY = 8  # words in a row that make a question a copy of its passage
SHARE = 0.8  # of a short question's words, likewise
# for the estimate: a token's characters; share of attempts that are kept; tokens of the three replies
CHARACTERS, KEPT, WRITTEN = 4.0, 0.4, (60, 10, 10)
EXCESS, FEWEST = 4, 10  # a run makes up to so many times the estimated attempts, of which these are the least
EXCERPT = 200  # characters that are kept of a reply without a question

_RULES = """\
- Whoever has not seen the text must know what is meant: name it, and write no "the passage" or "he".
- The answer is a name, a date, a number or a few words, exactly as in the text.
- Use words of your own in the question, and do not give the answer away in it.
Reply with these two lines and nothing else:
Question: ...
Answer: ..."""
ONE_HOP = "{passages}\n\nWrite one question that this text answers, and its answer.\n" + _RULES
TWO_HOPS = (
    "{passages}\n\nWrite one question that needs both texts, and its answer. Ask for something that the "
    'second text tells about "{second}", without that name: say instead what the first text tells of it, '
    'and name "{first}".\n' + _RULES
)
READ = "{passages}\n\nAnswer by this text, with as few words as possible and nothing else: {question}"
KNOW = 'Answer with as few words as possible and nothing else, or with "unknown": {question}'
_LINES = re.compile(
    r"^\W*Question\W*?:\W*?\s*(?P<question>\S.*?)\s*^\W*Answer\W*?:\s*(?P<answer>\S.*?)\s*$", re.M
)

Ask = Callable[[str], Reply]


@dataclass(frozen=True)
class Candidate:
    """One passage, or two of which the first names the second's title."""

    passages: tuple[Passage, ...]

    @property
    def kind(self) -> str:
        return "onehop" if len(self.passages) == 1 else "twohop"

    @property
    def text(self) -> str:
        """Return the passages as a model is shown them."""
        return "\n\n".join(f"{passage.title}\n{passage.text}" for passage in self.passages)


@dataclass(frozen=True)
class Attempt:
    """What came of a candidate; `refused` says why there is no question of it, empty where there is one.

    `reply` is how a reply in which no question was found begins.
    """

    key: str
    kind: str
    passages: tuple[str, ...]
    question: str
    answer: str
    refused: str
    prompt_tokens: int
    completion_tokens: int
    reply: str = ""


def one_hop(corpus: Sequence[Passage], seed: int) -> Iterator[Candidate]:
    """Yield passages in a drawn order, without the short ones."""
    for passage in _shuffled(corpus, f"onehop-{seed}"):
        if len(passage.text.split()) >= SHORTEST:
            yield Candidate((passage,))


def two_hops(corpus: Sequence[Passage], seed: int) -> Iterator[Candidate]:
    """Yield pairs in a drawn order, at most one of each first passage: it names the other one's title.

    The title must stand within a sentence as it is written: in English that leaves names, not "country".
    """
    titled: dict[str, Passage] = {}
    for passage in corpus:
        title = normalize(_name(passage.title))
        if len(title) >= SHORTEST_TITLE and not title.isdigit() and len(passage.text.split()) >= SHORTEST:
            titled.setdefault(title, passage)
    for passage in _shuffled(corpus, f"twohop-{seed}"):
        words, own = normalize(passage.text).split(), normalize(_name(passage.title))
        runs = (
            " ".join(words[i : i + n]) for n in range(LONGEST_TITLE, 0, -1) for i in range(len(words) - n + 1)
        )
        others = (run for run in runs if run in titled and run not in own and own not in run)
        if found := next((titled[run] for run in others if _is_named(titled[run], passage.text)), None):
            yield Candidate((passage, found))


def _is_named(passage: Passage, text: str) -> bool:
    """Return whether `text` has the title of `passage` within a sentence, as it is written."""
    return bool(re.search(rf"(?<=[^.!?]\s){re.escape(_name(passage.title))}\b", text))


def _name(title: str) -> str:
    """Return a title as texts name it: "Mercury (planet)" is Mercury."""
    return re.sub(r"\s*\([^()]*\)$", "", title)


def _shuffled(corpus: Sequence[Passage], seed: str) -> list[Passage]:
    return random.Random(seed).sample(corpus, len(corpus))


class QuestionWriter:
    """Asks a model for the question of a candidate, and judges what it writes."""

    def __init__(self, ask: Ask, model: str, closed_book: bool) -> None:
        """`closed_book`: refuse what the model answers without the passages. `model` tells attempts apart."""
        self._ask, self._closed_book = ask, closed_book
        self._settings = [model, closed_book, ONE_HOP, TWO_HOPS, READ, KNOW]

    def key(self, candidate: Candidate) -> str:
        """Return what an attempt is found by again: all that decides it but the model's replies."""
        content = [self._settings, [(each.id, each.contents) for each in candidate.passages]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def attempt(self, candidate: Candidate) -> Attempt:
        """Write and judge. Raises InfrastructureError where the model does not answer."""
        replies = [self._ask(_request(candidate))]
        found = _LINES.search(replies[0].text)
        question, answer = (_bare(found[key]) if found else "" for key in ("question", "answer"))
        refused = fault(candidate, question, answer)
        if not refused:
            replies.append(self._ask(READ.format(passages=candidate.text, question=question)))
            read, wanted = normalize(replies[-1].text), normalize(answer)
            if not read or not (stands_in(wanted, read) or stands_in(read, wanted)):
                refused = "not answered from its passages"
        if not refused and self._closed_book:
            replies.append(self._ask(KNOW.format(question=question)))
            if stands_in(normalize(answer), normalize(replies[-1].text)):
                refused = "known without its passages"
        return Attempt(
            self.key(candidate),
            candidate.kind,
            tuple(passage.id for passage in candidate.passages),
            question,
            answer,
            refused,
            sum(reply.prompt_tokens for reply in replies),
            sum(reply.completion_tokens for reply in replies),
            "" if found else replies[0].text[:EXCERPT],
        )


def _request(candidate: Candidate) -> str:
    if candidate.kind == "onehop":
        return ONE_HOP.format(passages=candidate.text)
    first, second = (passage.title for passage in candidate.passages)
    return TWO_HOPS.format(passages=candidate.text, first=first, second=second)


def _bare(text: str) -> str:
    """Return a line of a reply without quotes and emphasis around it, and without the last full stop."""
    return trimmed(text).strip("\"'“”*` ").removesuffix(".")


def fault(candidate: Candidate, question: str, answer: str) -> str:
    """Return what is wrong with a question as far as no model is needed to see it; nothing if all is well."""
    asked, wanted = normalize(question), normalize(answer)
    if not asked or not wanted:
        return "no question with an answer in the reply"
    *before, last = (normalize(passage.text) for passage in candidate.passages)
    if not stands_in(wanted, last):
        return "answer not in its passage"
    if stands_in(wanted, asked):
        return "answer in the question"
    if before and (
        stands_in(wanted, before[0]) or stands_in(normalize(_name(candidate.passages[-1].title)), asked)
    ):
        return "one passage is enough"
    words = asked.split()
    run = min(COPY, math.ceil(SHARE * len(words)))
    parts = (" ".join(words[i : i + run]) for i in range(len(words) - run + 1))
    if any(stands_in(part, text) for part in parts for text in (*before, last)):
        return "copied from its passage"
    return ""


class AttemptLog:
    """Keeps attempts, one a line, as soon as they are made; a line that a kill has cut is made again."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.known: dict[str, Attempt] = {}
        if path.is_file():
            content = path.read_bytes()
            if not content.endswith(b"\n"):
                path.write_bytes(content[: content.rfind(b"\n") + 1])
            self.known = {each.key: each for _, each in read_lines(path, lambda row, _: _attempt(row))}

    def add(self, attempt: Attempt) -> None:
        line = json.dumps(asdict(attempt), ensure_ascii=False) + "\n"
        with self._lock, self._path.open("ab") as file:
            file.write(line.encode())
            self.known[attempt.key] = attempt


def _attempt(row: dict[str, object]) -> Attempt:
    try:
        return Attempt(**{**row, "passages": tuple(row["passages"])})  # type: ignore[arg-type]
    except (TypeError, KeyError) as error:
        raise ValueError(f"no attempt of `dgpo questions`: {error}") from None


def write_questions(
    candidates: Iterator[Candidate],
    count: int,
    writer: QuestionWriter,
    log: AttemptLog,
    concurrency: int,
    progress: Callable[[int, int], None],
) -> tuple[list[Question], list[Attempt]]:
    """Return the first `count` good questions, and all attempts up to there.

    Fewer where candidates end, or after EXCESS times the attempts that were to be expected: a model that is
    not up to it must not go through the whole corpus. Attempts of `log` are not made again, and do not count.
    `progress` gets questions and attempts so far.
    """
    most = len(log.known) + EXCESS * max(FEWEST, math.ceil(count / KEPT))

    def attempt(candidate: Candidate) -> Attempt:
        made = log.known.get(writer.key(candidate))
        if made is None:
            made = writer.attempt(candidate)
            log.add(made)
        return made

    questions: list[Question] = []
    attempts: list[Attempt] = []
    asked: set[frozenset[str]] = set()
    with ThreadPoolExecutor(concurrency) as threads:
        while len(questions) < count and (left := most - len(log.known)) > 0:
            if not (batch := list(islice(candidates, min(concurrency, left)))):
                break
            for candidate, made in zip(batch, threads.map(attempt, batch), strict=True):
                if len(questions) == count:
                    break
                words = frozenset(normalize(made.question).split())
                if not made.refused and words in asked:
                    made = replace(made, refused="asked before")
                attempts.append(made)
                if not made.refused:
                    asked.add(words)
                    questions.append(_question(candidate, made))
            progress(len(questions), len(attempts))
    return questions, attempts


def _question(candidate: Candidate, made: Attempt) -> Question:
    gold = [{"id": each.id, "title": each.title, "text": each.text} for each in candidate.passages]
    metadata = {"type": made.kind, "golden_passages": gold}
    return Question(f"{made.kind}-{made.key}", made.question, (made.answer,), metadata)


@dataclass(frozen=True)
class Estimate:
    """What so many questions take."""

    attempts: int
    requests: int
    prompt_tokens: int
    completion_tokens: int

    def cost(self, price_in: float, price_out: float) -> float:
        """Return it, from prices of a million tokens read and written."""
        return (self.prompt_tokens * price_in + self.completion_tokens * price_out) / 1e6


def estimate(corpus: Sequence[Passage], wanted: dict[str, int], closed_book: bool) -> Estimate:
    """Estimate attempts and tokens of `wanted` questions of each kind: all replies, of mean passages.

    Raises UserError for an empty corpus.
    """
    if not corpus:
        raise UserError("the corpus has no passages")
    passage = sum(len(each.contents) for each in corpus) / len(corpus) / CHARACTERS
    attempts = prompt = completion = 0
    for kind, count in wanted.items():
        tried = math.ceil(count / KEPT)
        hops, form = (1, ONE_HOP) if kind == "onehop" else (2, TWO_HOPS)
        asked = [len(form) / CHARACTERS + hops * passage, len(READ) / CHARACTERS + hops * passage]
        asked += [len(KNOW) / CHARACTERS] * closed_book
        attempts += tried
        prompt += round(tried * sum(asked))
        completion += tried * sum(WRITTEN[: len(asked)])
    return Estimate(attempts, attempts * (3 if closed_book else 2), prompt, completion)
