"""An audit of questions and corpus before a model runs: what can be answered, found, and is asked twice.

Words are compared as exact match compares them (dgpo_core/text.py). The corpus is read once, and memory does
not grow with it.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from dgpo_core.config.data import AuditConfig
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.text import letters, normalize, stands_in

Split = tuple[str, str]  # (set, train, dev or test)
Splits = Mapping[Split, Sequence[Question]]
NEED_NO_PASSAGE = ("yes", "no", "")  # "": an answer that normalises to nothing ("A") cannot be looked for
FEW_ANSWERABLE = 0.5  # shares of questions beyond these are worth a remark
OFTEN_CUT = 0.5
RARE_SCRIPT = 0.01  # of the passages
START = 200  # characters of a passage by which its script is told


class AnswerSearch:
    """Looks for golden answers in passages that come one at a time, normalised and as whole words.

    An answer that was found is looked for no more, so most passages of a large corpus cost little.
    """

    def __init__(self, questions: Splits) -> None:
        self._words: set[str] = set()  # answers of one word
        self._phrases: dict[tuple[str, str], set[str]] = defaultdict(set)  # first two words -> longer ones
        self._unspaced: set[str] = set()  # in scripts whose words no space divides
        for question in (question for items in questions.values() for question in items):
            for answer in map(normalize, question.golden_answers):
                first, *others = answer.split(" ")
                if stands_in(answer, f"x{answer}x"):
                    self._unspaced.add(answer)
                elif others:
                    self._phrases[first, others[0]].add(answer)
                elif answer not in NEED_NO_PASSAGE:
                    self._words.add(answer)

    def read(self, text: str) -> None:
        """Look for the answers that are still missing in a normalised text."""
        words = text.split(" ")
        self._words.difference_update(words)
        for pair in self._phrases.keys() & set(pairwise(words)):
            self._phrases[pair] -= {answer for answer in self._phrases[pair] if stands_in(answer, text)}
            if not self._phrases[pair]:
                del self._phrases[pair]
        self._unspaced -= {answer for answer in self._unspaced if answer in text}

    def answerable(self, questions: Sequence[Question]) -> float:
        """Return the share of `questions` of which a passage read so far has a golden answer.

        Those with an answer that no passage need have count too.
        """
        missing = self._words.union(self._unspaced, *self._phrases.values())
        able = [any(normalize(answer) not in missing for answer in q.golden_answers) for q in questions]
        return sum(able) / len(able) if able else 1.0


class CorpusAudit:
    """Reads passages one at a time: which answers they have, how long they are, and in which scripts."""

    def __init__(self, questions: Splits) -> None:
        self.answers = AnswerSearch(questions)
        self.passages = self.words = self.longest = 0  # the latter two in normalised words
        self.scripts: Counter[str] = Counter()  # of so many passages

    def read(self, passage: Passage) -> None:
        text = normalize(passage.contents)
        words = text.count(" ") + 1
        self.passages += 1
        self.words += words
        self.longest = max(self.longest, words)
        self.scripts[script(passage.text[:START])] += 1
        self.answers.read(text)


def script(text: str) -> str:
    """Return the script of most letters of `text`, as Unicode names it; empty where it has none."""
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else ""
    counts = Counter(_script(character) for character in text if character.isalpha())
    return max(sorted(counts), key=counts.__getitem__, default="")


@cache
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "unknown").split(maxsplit=1)[0].capitalize()
    return "Han" if name == "Cjk" else name


@dataclass(frozen=True)
class Probes:
    """What the audit asks of index and tokenizer.

    `search` returns each query's passages, as many as an episode sees; `prompt_tokens` and `shown_tokens`
    count those of a question's prompt and of the passages that are shown together.
    """

    search: Callable[[list[str]], list[list[Passage]]]
    prompt_tokens: Callable[[str], int]
    shown_tokens: Callable[[list[Passage]], int]


@dataclass(frozen=True)
class SplitAudit:
    """What was found in a split; shares are of its questions, and None where there was nothing to look at."""

    questions: int
    answerable: float  # some passage has an answer
    in_gold: float | None  # a gold passage has; of those with gold passages
    in_top_k: float | None  # a passage that the question finds as a query has; of those searched
    repeated: int  # asked before in the same split
    in_train: int | None  # asked in training too; None of training itself
    answers_in_train: float | None  # an answer of training is an answer here too, yes and no apart
    wordless_answers: int  # that normalise to nothing, and are compared as they are written
    prompt_tokens: int  # of the longest prompt
    long_questions: float  # at least so many, after whose prompt the protocol has no room for a whole turn
    cut_results: float | None  # passages together longer than the protocol shows; of those searched
    scripts: dict[str, float]


@dataclass(frozen=True)
class Audit:
    """The result of an audit: by split, of the corpus, and `remarks` as lines for people."""

    splits: dict[Split, SplitAudit]
    passages: int
    average_words: float
    longest_words: int
    scripts: dict[str, float]
    remarks: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """Return all figures of the splits by `<set>_<split>_<figure>`."""
        return {
            f"{name}_{split}_{key}": value
            for (name, split), own in self.splits.items()
            for key, value in vars(own).items()
            if isinstance(value, int | float)
        }


@dataclass(frozen=True)
class Room:
    """The protocol's limits in tokens: of a prompt that leaves room for a turn, of passages shown at once."""

    prompt: int
    shown: int


def audit(questions: Splits, corpus: CorpusAudit, probes: Probes, room: Room, searched: int) -> Audit:
    """Audit all splits, once `corpus` has read all passages.

    Of each split at most `searched` questions are searched for, the first, and so many of the longest are
    tokenised.
    """
    known = _known(questions)
    splits = {
        key: _audit_split(key, items, known, corpus, probes, room, searched)
        for key, items in questions.items()
    }
    count = max(1, corpus.passages)
    scripts = _shares(corpus.scripts)
    remarks = [line for key, own in splits.items() for line in _remarks("_".join(key), own, scripts)]
    return Audit(splits, corpus.passages, corpus.words / count, corpus.longest, scripts, remarks)


@dataclass(frozen=True)
class _Known:
    """Questions (by letters and digits) and normalised answers of all training sets, and of validation."""

    train: frozenset[str]
    dev: frozenset[str]
    answers: frozenset[str]


def _known(questions: Splits) -> _Known:
    asked = {
        split: frozenset(letters(q.question) for (_, s), own in questions.items() if s == split for q in own)
        for split in ("train", "dev")
    }
    answers = (answer_entities(q) for (_, s), own in questions.items() if s == "train" for q in own)
    return _Known(asked["train"], asked["dev"], frozenset().union(*answers))


def answer_entities(question: Question) -> set[str]:
    """Return the normalised golden answers that name something: not yes, no or nothing."""
    return {normalize(answer) for answer in question.golden_answers} - set(NEED_NO_PASSAGE)


def _audit_split(
    key: Split,
    items: Sequence[Question],
    known: _Known,
    corpus: CorpusAudit,
    probes: Probes,
    room: Room,
    searched: int,
) -> SplitAudit:
    split = key[1]
    # test questions are compared with those of validation too, which come from the same files as training's
    earlier = {"dev": known.train, "test": known.train | known.dev}.get(split)
    asked = [letters(question.question) for question in items]
    gold = [(q, _gold(q)) for q in items if _gold(q)]
    some = items[:searched]
    found = probes.search([question.question for question in some])
    texts = [[passage.contents for passage in passages] for passages in found]
    longest = sorted((question.question for question in items), key=len, reverse=True)[:searched]
    tokens = list(map(probes.prompt_tokens, longest))  # those of the others are fewer
    return SplitAudit(
        questions=len(items),
        answerable=corpus.answers.answerable(items),
        in_gold=_share(_answered(q, passages) for q, passages in gold),
        in_top_k=_share(_answered(q, passages) for q, passages in zip(some, texts, strict=True)),
        repeated=len(asked) - len(set(asked)),
        in_train=None if earlier is None else sum(own in earlier for own in asked),
        answers_in_train=None
        if earlier is None
        else _share(bool(answer_entities(question) & known.answers) for question in items),
        wordless_answers=sum(not normalize(answer) for q in items for answer in q.golden_answers),
        prompt_tokens=max(tokens, default=0),
        long_questions=sum(count > room.prompt for count in tokens) / max(1, len(items)),
        cut_results=_share(probes.shown_tokens(passages) > room.shown for passages in found),
        scripts=_shares(Counter(script(question.question) for question in items)),
    )


def _gold(question: Question) -> list[str]:
    return [f"{each['title']}\n{each['text']}" for each in question.metadata.get("golden_passages") or []]


def _answered(question: Question, texts: Iterable[str]) -> bool:
    """Tell whether a golden answer stands in one of the texts, or needs to stand in none."""
    answers = list(map(normalize, question.golden_answers))
    if any(answer in NEED_NO_PASSAGE for answer in answers):
        return True
    return any(stands_in(answer, text) for text in map(normalize, texts) for answer in answers)


def _share(truths: Iterable[bool]) -> float | None:
    listed = list(truths)
    return sum(listed) / len(listed) if listed else None


def _shares(counts: Counter[str]) -> dict[str, float]:
    total = max(1, counts.total())
    return {name: count / total for name, count in counts.most_common() if name}


def _remarks(name: str, own: SplitAudit, scripts: Mapping[str, float]) -> list[str]:
    number = f"{own.questions:,} questions"
    foreign = [kind for kind in own.scripts if scripts.get(kind, 0.0) < RARE_SCRIPT]
    said = {
        f"no passage has an answer to {1 - own.answerable:.0%} of {number}": own.answerable < FEW_ANSWERABLE,
        f"{own.in_train or 0:,} of {number} are also in the training files": own.in_train,
        f"{own.repeated:,} of {number} are asked twice": own.repeated,
        f"{own.wordless_answers:,} answers are compared as written: of their words nothing is left": (
            own.wordless_answers
        ),
        f"of {own.cut_results or 0:.0%} the passages found are longer than protocol.max_information": (
            (own.cut_results or 0.0) > OFTEN_CUT
        ),
        f"questions in {', '.join(foreign)}, in which there are hardly any passages": foreign,
    }
    return [f"{name}: {line}" for line, applies in said.items() if applies]


def beyond(found: Audit, limits: AuditConfig) -> list[str]:
    """Return a line for each figure beyond its limit."""
    lines = []
    for (name, split), own in found.splits.items():
        where, number = f"{name}/{split}", f"{own.questions:,} questions"
        if own.answerable < limits.min_answerable:
            said = f"a passage has an answer to {own.answerable:.1%} of {number}"
            lines.append(f"{where}: {said}, below audit.min_answerable {limits.min_answerable:g}")
        if (own.in_train or 0) > limits.max_in_train * own.questions:
            said = f"training asks {own.in_train:,} of {number} too"
            lines.append(f"{where}: {said}, above audit.max_in_train {limits.max_in_train:g}")
        if own.long_questions > limits.max_long_questions:
            said = f"{own.long_questions:.1%} of {number} leave no room for a turn in protocol.max_context"
            lines.append(f"{where}: {said}, above audit.max_long_questions {limits.max_long_questions:g}")
    return lines
