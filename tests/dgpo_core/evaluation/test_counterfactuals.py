"""Dealt passages, and what the answers of a scripted model owe to them."""

from typing import Any

from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.engine import Generation, Request
from dgpo_core.agent.episode import Episode
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.config.agent import GREEDY, ProtocolConfig
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.evaluation.counterfactuals import counterfactual_em, gold_dealer, nothing, random_dealer
from tests.dgpo_core.agent.scripted import Answering, ScriptedEngine
from tests.dgpo_core.evaluation.episodes import GOLDEN, TWO_HOP, UNKNOWN

CORPUS = [Passage(str(i), f"Town {i}", f"Town {i} lies in Tarn.") for i in range(50)]
GIVEN_UP = Question("silent", "Where was nobody born", ("Tarn",), {"golden_passages": GOLDEN})


class Reader(ScriptedEngine):
    """Searches once, answers what its passages say, and else guesses; one question it guesses at once."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, lambda seed, turn: "")
        self.read: list[str] = []

    def answer(self, request: Request, stop: tuple[str, ...]) -> Generation:
        shown = self.tokenizer.decode(request.token_ids)
        self.read.append(shown)
        guess = "Tarn" if "nobody" in shown else "Oslo"
        answer = f"<answer> {'Velmora' if 'born in Velmora' in shown else guess} </answer>"
        text = answer if "nobody" in shown or "information" in shown else "<search> Ada </search>"
        text = answer.removeprefix("<answer>") if shown.endswith("<answer>") else text
        self.script = lambda seed, turn: text
        return super().answer(request, stop)


def test_dealers() -> None:
    assert nothing(TWO_HOP)(0) == []
    ids = [passage["id"] for passage in GOLDEN]

    def golds(top_k: int) -> list[list[str]]:
        deal = gold_dealer(top_k)(TWO_HOP)
        assert deal
        return [[passage.id for passage in deal(number)] for number in range(3)]

    assert golds(3) == [ids] * 3
    assert golds(1) == [ids[:1], ids[1:], ids[:1]]
    assert gold_dealer(3)(UNKNOWN) is None
    deals = [
        random_dealer(CORPUS, 3, seed)(question) for seed in (0, 0, 1) for question in (TWO_HOP, UNKNOWN)
    ]
    drawn = [tuple(each.id for each in deal(number)) for deal in deals if deal for number in (0, 1)]
    assert drawn[:4] == drawn[4:8], "the same question, search and seed"
    assert len({*drawn}) == 8, "another question, search or seed"
    assert all(len({*each}) == 3 for each in drawn)


def test_what_comes_of_search(tokenizer: PreTrainedTokenizerFast) -> None:
    retriever = Answering([Passage("2", "Ada Quill", "Ada Quill was born in Velmora.")])
    engine = Reader(tokenizer)
    loop = AgentLoop(engine, tokenizer, retriever, ProtocolConfig(instruction="short"), 3)
    tasks = [Task(question, "set") for question in (TWO_HOP, UNKNOWN, GIVEN_UP)]
    true = loop.run(tasks, GREEDY)
    assert [(episode.correct, len(episode.searches)) for episode in true] == [(True, 1), (True, 1), (True, 0)]
    ran: dict[str, list[Episode]] = {}
    searched = retriever.calls

    def run(tasks: list[Task], name: str) -> list[Episode]:
        ran[name] = loop.run(tasks, GREEDY)
        return ran[name]

    rows = counterfactual_em(list(zip(tasks, true, strict=True)), CORPUS, 2, 0, run)
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        assert (row.occasions, row.failed) == (1, False)
        found.setdefault(row.measurement, {})[row.question_id] = row.events
    assert found == {
        "em_true_retriever": {"two": 1, "three": 1, "silent": 1},
        "em_closed_book": {"two": 0, "three": 0, "silent": 1},
        "em_empty_retriever": {"two": 0, "three": 0, "silent": 1},
        "em_random_passages": {"two": 0, "three": 0, "silent": 1},
        "em_gold_passages": {"two": 1, "silent": 1},
        "em_of_search": {"two": 1, "three": 1, "silent": 0},
    }
    assert retriever.calls == searched, "the true retriever is not asked"
    assert {name: len(own) for name, own in ran.items()} == {
        "em_closed_book": 3, "em_empty_retriever": 2, "em_random_passages": 2, "em_gold_passages": 1
    }  # fmt: skip
    assert all(each.searches[0].passage_ids == [] for each in ran["em_empty_retriever"])
    assert [each.searches[0].passage_ids for each in ran["em_gold_passages"]] == [["1", "2"]]
    assert not any("information" in text for text in engine.read if text.endswith("<answer>"))


def test_without_a_corpus_no_random_passages_are_dealt() -> None:
    rows = counterfactual_em([], [], 3, 0, lambda tasks, name: [])
    assert rows == []
