"""What a model's answers owe to search: EM on the same questions with other passages than the retriever's.

Whatever the model asks, its searches return nothing, random passages of the corpus, or the question's gold
passages. Closed book, it cannot search at all: its answer is forced right after the question, as a model that
has learnt to search first would only ask in vain.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from dgpo_core.agent.episode import Episode
from dgpo_core.agent.loop import Deal, Task, stable_seed
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.evaluation.arcap import FORCED_ANSWER, Run
from dgpo_core.evaluation.search_use import OF_SEARCH, Count, count

Dealer = Callable[[Question], Deal | None]  # None for a question that cannot be asked this way


def nothing(question: Question) -> Deal:
    """Return the empty retriever."""
    return lambda number: []


def random_dealer(passages: list[Passage], top_k: int, seed: int) -> Dealer:
    """Return a dealer of random passages, drawn anew for each search of each question."""

    def dealer(question: Question) -> Deal:
        def deal(number: int) -> list[Passage]:
            drawn = random.Random(stable_seed(seed, "random passages", question.id, number))
            return drawn.sample(passages, min(top_k, len(passages)))

        return deal

    return dealer


def gold_dealer(top_k: int) -> Dealer:
    """Return a dealer of the question's gold passages: the next `top_k` at each search, round and round."""

    def dealer(question: Question) -> Deal | None:
        gold = [
            Passage(str(each.get("id") or each["title"]), each["title"], each["text"])
            for each in question.metadata.get("golden_passages") or []
        ]

        def deal(number: int) -> list[Passage]:
            count = min(top_k, len(gold))
            return [gold[(number * count + i) % len(gold)] for i in range(count)]

        return deal if gold else None

    return dealer


def counterfactual_em(
    asked: list[tuple[Task, Episode]], passages: list[Passage], top_k: int, seed: int, run: Run
) -> list[Count]:
    """Count correct answers with the true retriever and each other one, and those that come of search.

    `asked` are tasks with their episodes of the true retriever; random `passages` are only dealt if there are
    any. An episode without a search is the same whatever searches would find, so it is not run again. What
    comes of search is 1, 0 or -1 a question: correct with the true retriever minus with the empty one.
    """
    dealers: dict[str, Dealer] = {"em_empty_retriever": nothing, "em_gold_passages": gold_dealer(top_k)}
    if passages:
        dealers["em_random_passages"] = random_dealer(passages, top_k, seed)
    closed = [replace(task, opening=FORCED_ANSWER, single_turn=True) for task, _ in asked]
    rows = {
        "em_true_retriever": _correct("em_true_retriever", [episode for _, episode in asked]),
        "em_closed_book": _correct("em_closed_book", run(closed, "em_closed_book")),
    }
    for name, dealer in dealers.items():
        dealt = [(task, episode, deal) for task, episode in asked if (deal := dealer(task.question))]
        again = [replace(task, deal=deal) for task, episode, deal in dealt if episode.searches]
        found = iter(run(again, name))
        rows[name] = _correct(name, [next(found) if e.searches else e for _, e, _ in dealt])
    rows[OF_SEARCH] = [
        replace(
            true,
            measurement=OF_SEARCH,
            events=true.events - empty.events,
            failed=true.failed or empty.failed,
        )
        for true, empty in zip(rows["em_true_retriever"], rows["em_empty_retriever"], strict=True)
    ]
    return [row for own in rows.values() for row in own]


def _correct(name: str, episodes: list[Episode]) -> list[Count]:
    return [count(name, episode, int(episode.correct)) for episode in episodes]
