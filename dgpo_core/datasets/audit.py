"""An audit of questions and corpus: answers that no passage has, and questions of two splits."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dgpo_core.datasets.records import Passage, Question
from dgpo_core.text import letters, normalize, stands_in

Splits = Mapping[tuple[str, str], Sequence[Question]]  # (set, train, dev or test) -> questions
FEW_ANSWERABLE = 0.5  # a share of questions below this is worth a remark
NEED_NO_PASSAGE = ("yes", "no", "")  # "": an answer that normalises to nothing ("A") cannot be looked for


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

    def read(self, passage: Passage) -> None:
        """Look for the answers that are still missing."""
        text = normalize(passage.contents)
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


def asked_in_training(questions: Splits) -> dict[tuple[str, str], int]:
    """Return how many questions of each held-out split are asked in training too, of any set.

    Questions are the same by letters and digits, as gold contexts are joined. Test questions are compared
    with the validation questions too, which come from the same file as those of training.
    """
    known = {
        split: {letters(q.question) for (_, own), items in questions.items() if own == split for q in items}
        for split in ("train", "dev")
    }
    training = {"dev": known["train"], "test": known["train"] | known["dev"]}
    return {
        (name, split): sum(letters(question.question) in training[split] for question in items)
        for (name, split), items in questions.items()
        if split in training
    }


@dataclass(frozen=True)
class Audit:
    """The result of an audit: `counts` for the stage's metrics, `remarks` as lines for people."""

    counts: dict[str, float]
    remarks: list[str]


def audit(questions: Splits, answers: AnswerSearch) -> Audit:
    """Audit all splits, once `answers` has read the corpus (docs/data.md says what is counted)."""
    counts: dict[str, float] = {}
    remarks = []
    leaked = asked_in_training(questions)
    for key, items in questions.items():
        name, number = "_".join(key), f"{len(items):,} questions"
        counts[f"{name}_answerable"] = share = answers.answerable(items)
        if share < FEW_ANSWERABLE:
            remarks.append(f"{name}: no passage has an answer to {1 - share:.0%} of {number}")
        if key in leaked:
            counts[f"{name}_in_train"] = leaked[key]
        if leaked.get(key):
            remarks.append(f"{name}: {leaked[key]:,} of {number} are also in the training files")
        if wordless := sum(not normalize(answer) for q in items for answer in q.golden_answers):
            counts[f"{name}_wordless_answers"] = wordless
    return Audit(counts, remarks)
