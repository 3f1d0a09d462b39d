"""`dgpo questions` against a server whose "model" is a script; what must come out is worked out by hand."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from dgpo_core.config.endpoint import EndpointConfig
from dgpo_core.datasets.question_writing import Candidate, estimate, fault, one_hop, two_hops
from dgpo_core.datasets.records import Passage, Question, read_questions, write_jsonl
from dgpo_core.errors import InfrastructureError, UserError
from tasks.commands.questions import Order, questions
from tests.endpoint import Body, endpoint

FILL = "It is known for its harbour, its old market and the many visitors who come there in summer."
TOWNS = [
    Passage(
        str(n),
        f"Town{n}",
        f"The founder of this place was Person{n} Smith. {FILL} Town{n} lies in the north.",
    )
    for n in range(8)
]
RIVER = Passage(
    "r", "Long River", f"The Long River flows past Town3 and reaches the sea after a week. {FILL}"
)
CORPUS = [*TOWNS, RIVER, Passage("s", "Stub", "Too short.")]


def say(body: Body) -> str | int:
    """Writes as it is told by the number of the town: most questions have one fault or another."""
    text = body["messages"][0]["content"]
    asked = re.search(r"Who founded (?:the place at the )?(\S+?)\?", text)
    if "Write one question" not in text:
        assert asked
        if text.startswith("Answer with"):
            return "Person4 Smith, I think" if asked[1] == "Town4" else "unknown"
        told = re.search(r"founder of this place was (\w+ Smith)", text)
        return "I cannot say" if told is None or asked[1] == "Town5" else f"It was {told[1]}."
    if "needs both texts" in text:
        return "Question: Who founded the place at the Long?\nAnswer: Person3 Smith"
    number = re.search(r"Town(\d)", text)
    if number is None:
        return "I would rather not."
    return {
        "0": "**Question:** Who founded Town0?\n**Answer:** *Person0 Smith*.",
        "1": "Question: Who founded Town1?\nAnswer: Person7 Smith",
        "2": "Question: Was Person2 Smith the one who founded Town2?\nAnswer: Person2 Smith",
        "6": f"Question: {FILL[:-1]} of Town6?\nAnswer: north",
        "7": "Question: Who founded Town0?\nAnswer: Person7 Smith",
    }.get(number[1], f"Question: Who founded Town{number[1]}?\nAnswer: Person{number[1]} Smith")


def write(source: str, one: int = 20, two: int = 0, closed_book: bool = True, confirmed: bool = True) -> None:
    wanted = {kind: count for kind, count in (("onehop", one), ("twohop", two)) if count}
    order = Order(wanted, 0, closed_book, 1.0, 2.0)
    settings = EndpointConfig(attempts=1, concurrency=3)
    questions(source, Path("corpus.jsonl"), Path("q.jsonl"), order, settings, confirmed)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("corpus.jsonl"), CORPUS)


def attempts() -> dict[str, str]:
    rows = map(json.loads, Path("q.attempts.jsonl").read_text().splitlines())
    return {"+".join(row["passages"]): row["refused"] for row in rows}


def test_every_question_is_checked(corpus: None, capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(say) as server:
        write(server.source, two=5)
    assert attempts() == {
        "0": "",
        "1": "answer not in its passage",
        "2": "answer in the question",
        "3": "",
        "4": "known without its passages",
        "5": "not answered from its passages",
        "6": "copied from its passage",
        "7": "",  # its question is Town0's: one of both is asked before
        "r": "answer not in its passage",
        "r+3": "",
    }
    found = {each.metadata["type"]: each for each in read_questions(Path("q.jsonl"))}
    two = found["twohop"]
    assert two.question == "Who founded the place at the Long?" and two.golden_answers == ("Person3 Smith",)
    assert [each["id"] for each in two.metadata["golden_passages"]] == ["r", "3"]
    assert two.metadata["golden_passages"][1]["text"] == TOWNS[3].text
    out = capsys.readouterr().out
    assert "asked before" in out and "twohop: 1 of 5 after 1 attempts" in out


def test_a_run_that_was_ended_gives_the_same_and_pays_nothing_twice(
    corpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its first requests the server goes down; the last line of the file is cut in half, too."""
    with endpoint(say) as server:
        write(server.source)
        expected = Path("q.jsonl").read_bytes()
        once = len(server.requests)
    Path("q.jsonl").unlink()
    Path("q.attempts.jsonl").unlink()
    budget = [0]

    def failing(body: Body) -> str | int:
        budget[0] -= 1
        return say(body) if budget[0] >= 0 else 503

    with endpoint(failing) as server:
        for allowed in range(3, 60, 4):
            budget[0] = allowed
            try:
                write(server.source)
                break
            except InfrastructureError:
                assert not Path("q.jsonl").exists()
                log = Path("q.attempts.jsonl")
                if log.exists() and allowed == 7:
                    log.write_bytes(log.read_bytes()[:-9])
        asked = len(server.requests)
    assert Path("q.jsonl").read_bytes() == expected
    assert asked > once
    with endpoint(lambda body: 503) as server:
        write(server.source)  # all is there
        assert not server.requests
    assert Path("q.jsonl").read_bytes() == expected


def test_as_many_as_are_wanted(corpus: None) -> None:
    with endpoint(say) as server:
        write(server.source, one=1)
    assert len(read_questions(Path("q.jsonl"))) == 1 and len(attempts()) < len(CORPUS)


def test_closed_book_is_a_switch(corpus: None) -> None:
    with endpoint(say) as server:
        write(server.source, closed_book=False)
        assert not any("unknown" in body["messages"][0]["content"] for body in server.requests)
    assert attempts()["4"] == ""


def test_nothing_is_asked_before_the_cost_is_agreed_on(
    corpus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("typer.confirm", lambda text, abort: (_ for _ in ()).throw(typer.Abort()))
    with endpoint(say) as server:
        with pytest.raises(typer.Abort):
            write(server.source, one=4, confirmed=False)
        assert not server.requests
    assert "about 10 attempts, 30 requests" in capsys.readouterr().out


def test_no_endpoint(corpus: None) -> None:
    for source in ("models/teacher", "https://host/v1"):
        with pytest.raises(UserError, match="no endpoint"):
            write(source)


def test_a_model_that_writes_nothing_of_use(corpus: None) -> None:
    with endpoint(lambda body: "Hello!") as server, pytest.raises(UserError, match="take a larger model"):
        write(server.source)


def test_a_useless_model_does_not_go_through_the_whole_corpus(
    corpus: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run makes forty attempts, four times the ten that are taken for the least to be expected."""
    write_jsonl(Path("corpus.jsonl"), [Passage(str(n), f"Town{n}", f"{FILL} {FILL}") for n in range(200)])
    with endpoint(lambda body: "Towns are nice.") as server:
        for made in (40, 80):
            with pytest.raises(UserError, match=f"no question of {made} attempts is good"):
                write(server.source, one=2)
            assert len(attempts()) == made == len(server.requests)
    out = capsys.readouterr().out
    assert "40 refused: no question with an answer in the reply; one was: 'Towns are nice.'" in out


def test_pairs_are_those_of_which_one_names_the_other() -> None:
    corpus = [
        Passage("a", "Mercury (planet)", f"Mercury is nearest to the Sun. {FILL}"),
        Passage("b", "Solar Orbiter", f"Solar Orbiter passes Mercury twice. {FILL}"),
        Passage("c", "Solar", f"Solar is a word, and an orbiter of Mercury is none. {FILL}"),
        Passage("d", "Hall", f"The hall has a model of the Solar Orbiter beside Mercury. {FILL}"),
        Passage("e", "1984", f"A year. {FILL}"),
        Passage("g", "Harbour", f"Ships are there. {FILL}"),
        Passage("h", "Visitors", f"Visitors come. {FILL}"),
        Passage("f", "Years", f"The year 1984 came after 1983. {FILL}"),
    ]
    pairs = {tuple(each.id for each in pair.passages) for pair in two_hops(corpus, 0)}
    assert pairs == {("b", "a"), ("c", "a"), ("d", "b")}
    assert {pair.passages for pair in one_hop(corpus, 0)} == {(passage,) for passage in corpus}
    orders = [[each.passages[0].id for each in one_hop(corpus * 5, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_two_hops_need_both_passages() -> None:
    pair = Candidate((RIVER, TOWNS[3]))
    assert fault(pair, "Who founded the place that Long River passes?", "Person3 Smith") == ""
    assert fault(pair, "Who founded Town3?", "Person3 Smith") == "one passage is enough"
    assert (
        fault(pair, "What do visitors of the place by Long River see?", "old market")
        == "one passage is enough"
    )


def test_an_estimate_by_hand() -> None:
    """Ten questions are 25 attempts, of three requests each."""
    corpus = [Passage("1", "A", "x" * 396)]  # with title, quotes and line break 400 characters
    found = estimate(corpus, {"onehop": 10}, closed_book=True)
    assert (found.attempts, found.requests, found.completion_tokens) == (25, 75, 25 * 80)
    assert 25 * 200 < found.prompt_tokens < 25 * 500
    assert estimate(corpus, {"onehop": 10}, closed_book=False).requests == 50
    million: Any = found.__class__(1, 1, 2_000_000, 1_000_000)
    assert million.cost(1.5, 4.0) == 7.0
    with pytest.raises(UserError, match="no passages"):
        estimate([], {"onehop": 1}, True)


def test_what_is_written_is_in_the_projects_form(corpus: None) -> None:
    with endpoint(say) as server:
        write(server.source, one=2)
    for row in map(json.loads, Path("q.jsonl").read_text().splitlines()):
        read = Question.from_json(row)
        assert read.id.startswith("onehop-") and read.metadata["golden_passages"][0]["id"] in "012345678"
