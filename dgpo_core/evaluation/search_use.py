"""How a model uses search, beyond ARCap: counts a question (docs/method.md, "Use of search").

Do searches bring something new, is the thinking more than a form, and does a model stop searching when it
has what it needs? What its answers owe to the passages is in `counterfactuals.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from dgpo_core.agent.actions import ActionKind, parse_action
from dgpo_core.agent.episode import Decode, Ending, Episode, Outcome, Search, nothing_new
from dgpo_core.datasets.records import Question
from dgpo_core.evaluation.diagnosis import needed, new_evidence
from dgpo_core.text import lower_unpunctuated, normalize

OF_SEARCH = "em_of_search"
MEASUREMENTS = (
    "em_true_retriever",
    "em_closed_book",
    "em_empty_retriever",
    "em_random_passages",
    "em_gold_passages",
    OF_SEARCH,
    "searches_nothing_new",
    "searches_no_evidence",
    "thinking_degenerate",
    "thinking_empty",
    "thinking_question",
    "thinking_repeated",
    "thinking_loop",
    "decisions_right",
    "answered_too_early",
    "searched_too_long",
    "decisions_neither",
)
LOOP = 3  # times in a row that make a sequence of words a loop
LONGEST = 8  # words of such a sequence
Counts = dict[str, tuple[int, int]]  # measurement -> (events, occasions)


@dataclass(frozen=True)
class Count:
    """How often something happened in a question's episode: `events` among `occasions`.

    Correct answers are events of one occasion. `failed` episodes count nowhere.
    """

    measurement: str
    dataset: str
    question_id: str
    events: int
    occasions: int
    failed: bool


def count(name: str, episode: Episode, events: int, occasions: int = 1) -> Count:
    """Return the count `name` of an episode."""
    failed = episode.outcome is Outcome.FAILED
    return Count(name, episode.dataset, episode.question_id, events, occasions, failed)


def use_of_search(
    episodes: list[Episode], questions: Mapping[tuple[str, str], Question], decode: Decode
) -> list[Count]:
    """Count searches, thinking and decisions of every episode; `questions` are keyed by data set and id."""
    rows = []
    for episode in episodes:
        question = questions[episode.dataset, episode.question_id]
        turns = episode.turn_texts(decode)
        counts = (
            searching(question, episode.searches)
            | thinking(question.question, turns)
            | deciding(episode, question, turns)
        )
        rows += [count(name, episode, *numbers) for name, numbers in counts.items()]
    return rows


def searching(question: Question, searches: list[Search]) -> Counts:
    """Count searches after the first without a new passage, and searches without evidence that was missing.

    Evidence is the diagnosis': all gold passages, where these are known, else a passage with a golden answer.
    """
    again = nothing_new(searches)[1:]
    gains = new_evidence(question, searches)
    return {
        "searches_nothing_new": (sum(again), len(again)),
        "searches_no_evidence": (sum(not gain for gain in gains), len(searches)),
    }


_THOUGHT = re.compile(r"<think>(.*?)(?=</?(?:think|search|information|answer)>|\Z)", re.DOTALL)


def thought(turn: str) -> str:
    """Return what a turn thinks: the content of each `<think>` up to the next tag or the turn's end."""
    return " ".join(_THOUGHT.findall(turn)).strip()


def loops(text: str) -> bool:
    """Test whether a sequence of at most LONGEST words stands LOOP times in a row."""
    words = lower_unpunctuated(text).split()
    for size in range(1, min(LONGEST, len(words) // LOOP) + 1):
        same = 0  # words in a row that equal the one `size` places before
        for before, word in zip(words, words[size:], strict=False):
            same = same + 1 if before == word else 0
            if same == (LOOP - 1) * size:
                return True
    return False


def thinking(question: str, turns: list[str]) -> Counts:
    """Count the turns with degenerate thinking, each as the first kind that it is.

    These are: none at all; the question; what an earlier turn thought (both by normalised words); a loop.
    """
    found = dict.fromkeys(("thinking_empty", "thinking_question", "thinking_repeated", "thinking_loop"), 0)
    earlier: set[str] = set()
    for text in map(thought, turns):
        words = normalize(text)
        if not words:
            found["thinking_empty"] += 1
        elif words == normalize(question):
            found["thinking_question"] += 1
        elif words in earlier:
            found["thinking_repeated"] += 1
        elif loops(text):
            found["thinking_loop"] += 1
        earlier.add(words)
    degenerate = {"thinking_degenerate": sum(found.values())} | found
    return {name: (events, len(turns)) for name, events in degenerate.items()}


def deciding(episode: Episode, question: Question, turns: list[str]) -> Counts:
    """Count the decisions after searches: to answer, to search again, or neither.

    The oracle answers as soon as all the evidence was retrieved, and searches until then. Too early are
    answers among the decisions with evidence missing, too long searches among those without.
    """
    searches = episode.searches
    written = sum(parse_action(turn).kind is ActionKind.SEARCH for turn in turns)
    missing = needed(question)
    right = early = long = neither = complete = 0
    for number, gain in enumerate(new_evidence(question, searches), 1):
        missing -= gain
        is_last = number == len(searches)
        answered = is_last and episode.ending is Ending.ANSWERED
        searched = not is_last or written > len(searches)  # the last turn's search is not answered
        complete += not missing
        early += answered and bool(missing)
        long += searched and not missing
        right += answered if not missing else searched
        neither += not answered and not searched
    return {
        "decisions_right": (right, len(searches)),
        "answered_too_early": (early, len(searches) - complete),
        "searched_too_long": (long, complete),
        "decisions_neither": (neither, len(searches)),
    }


def as_table(rows: list[Count]) -> pa.Table:
    """Return the columns measurement, dataset, question_id, events, occasions and failed."""
    return pa.Table.from_pylist([vars(row) for row in rows])
