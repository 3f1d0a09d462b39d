"""The scripted expert in the real loop, on a real index, with tokens of two kinds; expectations by hand."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dgpo_core import rehearsal
from dgpo_core.agent.episode import Episode, Outcome
from dgpo_core.agent.expert import ExpertEngine, has_gold_passages, sentences
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.config.agent import GREEDY, ProtocolConfig
from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.retrieval.index import index_passages
from dgpo_core.world.facts import World
from dgpo_core.world.questions import Article, write_questions
from tests.dgpo_core.agent.scripted import Answering

NOVEL = Passage(
    "1", "Middlemarch", "It is long. Middlemarch is a novel by J. R. Eliot (b. 1819). Many read it."
)
AUTHOR = Passage("2", "J. R. Eliot", "The author was born in Nuneaton. She died in 1880.")
OTHERS = [
    Passage(str(number), f"Town {number}", f"Town {number} has a market. It is {number} miles from the sea.")
    for number in range(3, 12)
]
CORPUS = [NOVEL, AUTHOR, *OTHERS]
PROTOCOL = ProtocolConfig(instruction="short", max_context=2000, max_new_tokens=200, max_information=600)


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Any:
    return rehearsal.build_tokenizer("qwen2", [passage.contents for passage in CORPUS])


def asking(text: str, answers: tuple[str, ...], *gold: Passage) -> Question:
    passages = [{"title": passage.title, "text": passage.text} for passage in gold]
    return Question("q", text, answers, {"golden_passages": passages})


def episode(question: Question, tokenizer: Any, retriever: Any = None, **limits: Any) -> Episode:
    retriever = retriever or index_passages(CORPUS, EncoderConfig(kind="bm25"))
    loop = AgentLoop(
        ExpertEngine([question], tokenizer), tokenizer, retriever, PROTOCOL.model_copy(update=limits), 2
    )
    (run,) = loop.run([Task(question, "mine", seed=(0,))], GREEDY)
    return run


def test_sentences_end_where_a_reader_ends_them() -> None:
    assert sentences(NOVEL.text) == [
        "It is long.",
        "Middlemarch is a novel by J. R. Eliot (b. 1819).",
        "Many read it.",
    ]
    assert sentences('He said "Go!" Then it\nended. 3.5 km, e.g. here.') == [
        'He said "Go!"',
        "Then it ended.",
        "3.5 km, e.g. here.",
    ]
    assert sentences("東京は首都。人口は多い。") == ["東京は首都。", "人口は多い。"]


def test_one_passage(bytes_tokenizer: Any) -> None:
    """It states the sentence that has the answer, and the answer that stands there."""
    question = asking("Who wrote the novel Middlemarch?", ("George", "J. R. Eliot"), NOVEL)
    run = episode(question, bytes_tokenizer)
    assert run.correct and run.well_formed and run.hit and run.generations == 2
    assert [search.query for search in run.searches] == ["Who wrote the novel Middlemarch"]
    assert run.response.endswith(
        "<think> Middlemarch is a novel by J. R. Eliot (b. 1819). </think>\n<answer> J. R. Eliot </answer>"
    )
    text = bytes_tokenizer.decode(run.token_ids)
    assert text.startswith("<|im_start|>") and question.question in text  # the prompt is the model's own


def test_evidence_that_the_question_names_is_what_it_states(bytes_tokenizer: Any) -> None:
    question = asking("Who wrote the novel Middlemarch?", ("J. R. Eliot",), NOVEL)
    question.metadata["golden_passages"][0]["evidence"] = (
        "Middlemarch: It is long."  # title and text, as shown
    )
    run = episode(question, bytes_tokenizer)
    assert run.response.endswith("<think> Middlemarch: It is long. </think>\n<answer> J. R. Eliot </answer>")
    question.metadata["golden_passages"][0]["evidence"] = "Middlemarch: It is short."
    assert episode(question, bytes_tokenizer).prediction == "unknown"


def test_two_passages_one_after_the_other(bytes_tokenizer: Any) -> None:
    """The second is looked for by the title that the first has told, and never before."""
    question = asking("Where was the writer of the novel Middlemarch born?", ("Nuneaton",), NOVEL, AUTHOR)
    retriever = Answering([NOVEL])
    retriever.search = lambda queries, top_k: [  # type: ignore[method-assign]
        index.search([query], 1)[0] for query in queries
    ]
    index = index_passages([NOVEL, *OTHERS, AUTHOR], EncoderConfig(kind="bm25"))
    run = episode(question, bytes_tokenizer, retriever)
    assert run.correct and run.well_formed
    queries = [search.query for search in run.searches]
    assert queries == ["Where was the writer of the novel Middlemarch born", "J. R. Eliot"]
    assert "Middlemarch is a novel by J. R. Eliot (b. 1819). I need J. R. Eliot. </think>" in run.response


def test_what_is_not_found_is_looked_for_once_more_and_then_unknown(bytes_tokenizer: Any) -> None:
    question = asking("Which of them is by Eliot?", ("a novel",), NOVEL)
    run = episode(question, bytes_tokenizer, Answering(OTHERS))
    assert run.outcome is Outcome.WRONG and run.prediction == "unknown" and run.well_formed
    assert [search.query for search in run.searches] == ["Which of them is by Eliot", "Middlemarch"]


def test_a_title_that_is_the_answer_is_not_looked_for(bytes_tokenizer: Any) -> None:
    """Nobody could know it: a student would learn to guess."""
    question = asking("Who was born in Nuneaton?", ("J. R. Eliot",), AUTHOR)
    run = episode(question, bytes_tokenizer, Answering(OTHERS))
    assert run.outcome is Outcome.WRONG
    assert [search.query for search in run.searches] == ["Who was born in Nuneaton"]


def test_comparisons_state_what_is_compared(bytes_tokenizer: Any) -> None:
    question = asking("Which is further from the sea, Town 3 or Town 9?", ("Town 9",), OTHERS[0], OTHERS[6])
    run = episode(question, bytes_tokenizer)
    assert run.correct
    assert run.response.count("It is 3 miles from the sea.") == 2  # read and told
    assert run.response.endswith("It is 9 miles from the sea. </think>\n<answer> Town 9 </answer>")


def test_turns_keep_to_their_limit(bytes_tokenizer: Any) -> None:
    """A long thought is cut, never the action; tags in a passage are none of the expert's."""
    text = "The <answer> Rome </answer> " + "very " * 60 + "old capital is Paris."
    question = asking("What is it?", ("Paris",), Passage("1", "Capital", text))
    run = episode(question, bytes_tokenizer, Answering([Passage("1", "Capital", text)]), max_new_tokens=60)
    assert run.correct and run.well_formed and run.cut_turns == 0
    assert max(turn.end - turn.start for turn in run.turns) <= 60


def test_the_embedded_world_with_its_own_tokens(
    world: World, articles: list[Article], index: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    """What stands in the index is found and right, in chains of two as well."""
    questions = [each for key, each in write_questions(world, articles).items() if key[1] == "train"]
    asked = [question for each in questions for question in each[:15]]
    assert all(map(has_gold_passages, asked))
    limits = ProtocolConfig(instruction="short", max_context=1024, max_new_tokens=64, max_information=320)
    loop = AgentLoop(ExpertEngine(asked, tokenizer), tokenizer, index, limits, 3)
    runs = loop.run([Task(each, "x", seed=(number,)) for number, each in enumerate(asked)], GREEDY)
    assert sum(run.correct for run in runs) >= 0.9 * len(runs)
    assert all(run.well_formed and run.hit for run in runs if run.correct)


def test_questions_without_gold_passages_are_not_for_it() -> None:
    assert not has_gold_passages(Question("q", "Who?", ("x",)))
    for text in ("", " ", "<answer></answer>"):
        assert not has_gold_passages(Question("q", "Who?", ("x",), {"golden_passages": [{"text": text}]}))


def test_a_passage_without_a_title_has_one_wording(bytes_tokenizer: Any) -> None:
    question = Question("q", "Who?", ("x",), {"golden_passages": [{"text": "It was x."}]})
    assert has_gold_passages(question)
    run = episode(question, bytes_tokenizer, Answering(OTHERS))
    assert [search.query for search in run.searches] == ["Who"] and run.prediction == "unknown"
