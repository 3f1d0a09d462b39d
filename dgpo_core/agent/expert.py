"""A scripted expert for questions with gold passages: episodes where no teacher knows the protocol yet.

It runs in the ordinary loop against the ordinary index, and tells nothing that it has not read. For each gold
passage, in their order, it searches; when that has brought the passage's evidence, it states the sentence; in
the end it answers. What two wordings do not bring it does not know, and such an episode is wrong.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgpo_core.agent.answers import contains_answer
from dgpo_core.agent.engine import FinishReason, FunctionSession, Generation, Request
from dgpo_core.agent.prompts import TAGS, encode_text
from dgpo_core.datasets.records import Question
from dgpo_core.text import letters, normalize, stands_in

_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)\]]))\s+(?=[\"'“‘(\[]*[A-Z0-9])|(?<=[。！？])")
# an initial, or an abbreviation that a name follows: no end of a sentence
_ABBREVIATION = re.compile(r"(?:^|[\s(.])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|No|vs|ca?|[bdr])\.$")
_PARENTHESIS = re.compile(r"\s*\([^()]*\)$")  # of a title: "Mercury (planet)"
_TAG = re.compile(
    "|".join(re.escape(tag).replace("<", "< ?", 1) for tag in TAGS)
)  # as passages show them, too
UNKNOWN = "unknown"  # its answer to what it has not found


@dataclass(frozen=True)
class Step:
    """A gold passage as the expert reads it: its title, and the sentence in which it finds what it wants."""

    title: str
    evidence: str


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, on one line each."""
    found: list[str] = []
    open_end = False
    for piece in _SENTENCE_END.split(text):
        piece = " ".join(piece.split())
        if open_end:
            found[-1] += f" {piece}"
        elif piece:
            found.append(piece)
        open_end = bool(_ABBREVIATION.search(piece))
    return found


def has_gold_passages(question: Question) -> bool:
    """Return whether the expert can answer a question: the texts of its gold passages are known."""
    passages = question.metadata.get("golden_passages") or []
    return bool(passages) and all(sentences(_plain(each.get("text") or "")) for each in passages)


def steps_of(question: Question) -> list[Step]:
    """Return what there is to read: the last passage tells the answer, those before it the next title.

    A passage whose evidence the question names ("evidence") is read for that.
    """
    passages = question.metadata["golden_passages"]
    titles = [_plain(each.get("title") or "") for each in passages]
    steps = []
    for number, (title, passage) in enumerate(zip(titles, passages, strict=True)):
        following = titles[number + 1 : number + 2]
        wanted = [*following, *(_PARENTHESIS.sub("", each) for each in following)] or question.golden_answers
        told = sentences(_plain(passage["text"]))
        told_so = _plain(passage.get("evidence") or "")
        steps.append(Step(title, told_so or _evidence(told, wanted, titles, question)))
    return steps


def _evidence(told: list[str], wanted: Sequence[str], titles: list[str], question: Question) -> str:
    """Return the first sentence with something wanted, or with an answer, or the likest to the question.

    What stands in the question itself, as both sides of a comparison do, is no evidence.
    """
    for terms in (wanted, question.golden_answers):
        new = [term for term in terms if not contains_answer(question.question, [term])]
        if found := next((each for each in told if contains_answer(each, new)), None):
            return found
    asked = set(normalize(question.question).split()) - set(normalize(" ".join(titles)).split())
    return max(told, key=lambda each: len(asked & set(normalize(each).split())))


def _plain(text: str) -> str:
    """Return `text` without the protocol's tags, which would end a thought."""
    return _TAG.sub(" ", text)


class ExpertEngine:
    """An engine that writes the expert's turns; a request's seed begins with its question's number."""

    lane = None

    def __init__(self, questions: list[Question], tokenizer: Any) -> None:
        """All questions must have gold passages (`has_gold_passages`)."""
        self._questions, self._tokenizer = questions, tokenizer
        self._tried: Counter[tuple[int, int]] = Counter()  # searches for the nth step of a question
        self._told: Counter[int] = Counter()  # steps of a question whose evidence it has stated

    def session(self, stop: tuple[str, ...]) -> FunctionSession:
        return FunctionSession(self._turn)

    def _turn(self, request: Request) -> Generation:
        number = request.seed[0]
        question, context = self._questions[number], self._tokenizer.decode(request.token_ids)
        steps, known, read = steps_of(question), 0, letters(_plain(context))
        while known < len(steps) and letters(steps[known].evidence) in read:
            known += 1
        said = [step.evidence for step in steps[self._told[number] : known]]
        self._told[number] = known
        if known == len(steps):
            return self._generation(said, f"<answer> {_answer(question, steps[-1])} </answer>", request)
        tried = self._tried[number, known]
        self._tried[number, known] += 1
        queries = _wordings(question, steps[known], known, context)
        if tried or not queries:
            said.append("I do not see it.")
        if tried == len(queries):
            return self._generation(said, f"<answer> {UNKNOWN} </answer>", request)
        if not tried:
            said.append(f"I need {steps[known].title}." if known else "I search.")
        return self._generation(said, f"<search> {queries[tried]} </search>", request)

    def _generation(self, said: list[str], action: str, request: Request) -> Generation:
        """Return a turn that says these sentences; where they have no room, only their first words."""
        words, room = " ".join(said).split(), request.max_new_tokens
        while True:
            text = f"<think> {' '.join(words)} </think>\n{action}"
            ids = encode_text(text, self._tokenizer)
            if len(ids) <= room:
                return Generation(ids, [0.0] * len(ids), FinishReason.STOP)
            if not words:
                return Generation(ids[:room], [0.0] * room, FinishReason.LENGTH)
            words = words[: len(words) // 2]


def _wordings(question: Question, step: Step, number: int, context: str) -> list[str]:
    """Return queries for a step, the second for where the first finds nothing.

    The question is searched for in its own words, what it leads to by its title. A title that would give the
    answer away is no query, unless it has been read; neither is one that is not known.
    """
    asked = _plain(question.question).strip().rstrip("?").strip()
    title = step.title
    read = stands_in(normalize(title), normalize(context))
    if not title or (contains_answer(title, question.golden_answers) and not read):
        return [asked] if number == 0 else []
    return [title, f"{title} {asked}"] if number else [asked, title]


def _answer(question: Question, step: Step) -> str:
    """Return the golden answer that stands in the evidence, or the first one."""
    answers = question.golden_answers
    return next((each for each in answers if contains_answer(step.evidence, [each])), answers[0])
