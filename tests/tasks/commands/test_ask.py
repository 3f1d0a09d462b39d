"""`dgpo ask` with the committed teacher and a real index, and what its screen shows of events."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from dgpo_core.agent.episode import Ending
from dgpo_core.datasets.records import Question, read_questions
from dgpo_core.errors import UserError
from dgpo_core.serving.events import (
    AgentRequest,
    Delta,
    EpisodeRecord,
    Notice,
    RetrievedPassage,
    SearchResult,
    SourcePassage,
)
from tasks.commands.ask import Screen, ask, print_examples, printable
from tests.conftest import ROOT
from tests.tasks.miniature import make_project


@pytest.fixture(scope="module")
def question(indexed_project: Path) -> Question:
    return read_questions(indexed_project / "data/questions/onehop/test.jsonl")[0]


@pytest.mark.thorough
def test_the_command_prints_plain_text_without_a_terminal(indexed_project: Path, question: Question) -> None:
    command = [sys.executable, "-m", "tasks.commands.cli", "ask", question.question, "--model", "teacher"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=indexed_project, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and "\x1b" not in done.stdout
    assert done.stdout.startswith("think       ") and "\nanswer      " in done.stdout


def test_text_and_json_tell_the_same_episode(
    indexed_project: Path,
    question: Question,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(indexed_project)
    ask("teacher", AgentRequest(question.question), as_json=True, colour=True)
    record = EpisodeRecord.model_validate_json(capsys.readouterr().out)
    assert record.question == question.question and record.model == "teacher"
    ask("teacher", AgentRequest(question.question), as_json=False, colour=True)
    text = capsys.readouterr().out
    lines = text.splitlines()
    end = lines.index("")
    labels = [line.split()[0] for line in lines[:end] if not line.startswith(" ")]
    assert labels == [step.kind for step in record.steps]
    for search in record.searches:
        assert f"search      {search.query}" in lines
        assert all(f"{passage.title}: {passage.text}" in text for passage in search.passages), "whole"
    sources = [f"[{source.number}] {source.title}" for source in record.sources]
    where = ["Contained in", *sources] if sources else ["No retrieved passage contains this answer."]
    assert lines[end + 1 :] == [record.answer, *where]


def test_errors_of_the_user(
    indexed_project: Path, tmp_path: Path, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data/index: there is no index yet; run `make demo`"):
        ask("teacher", AgentRequest("Who"), as_json=False, colour=True)
    monkeypatch.chdir(indexed_project)
    with pytest.raises(UserError, match=r"between 0 and protocol.max_turns \(2\), not 3"):
        ask("teacher", AgentRequest(question.question, max_searches=3), as_json=True, colour=True)


def test_a_retriever_that_is_down_is_said_in_one_line(
    indexed_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_project(tmp_path, retrieval={"location": "http://127.0.0.1:9"})
    (tmp_path / "data").symlink_to(indexed_project / "data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        ask("teacher", AgentRequest("Who"), as_json=True, colour=True)
    told = capsys.readouterr()
    assert ended.value.code == 1 and told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("error: no answer, because the retriever failed: cannot fill the Qdrant")


def record(answer: str | None, **more: object) -> EpisodeRecord:
    """Of an episode that ran out of turns, unless `more` says otherwise."""
    texts = {"question": "q", "model": "m", "response": "", "ending": Ending.BUDGET, "failure": None}
    lists: dict[str, object] = {
        "sources": [],
        "unknown_words": [],
        "steps": [],
        "searches": [],
        "well_formed": False,
    }
    numbers = dict.fromkeys(("invalid_actions", "temperature", "seed", "model_tokens", "other_tokens"), 0)
    return EpisodeRecord.model_validate({**texts, **lists, **numbers, "answer": answer, **more})


def shown(*events: Delta | SearchResult | Notice, end: EpisodeRecord, terminal: bool = False) -> str:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=40, force_terminal=terminal, color_system=None, highlight=False))
    for event in events:
        screen.show(event)
    screen.close(end)
    return out.getvalue()


def test_deltas_become_paragraphs_without_spaces_at_their_ends() -> None:
    pieces = [("text", " "), ("think", " I"), ("think", " know "), ("think", "it. ")]
    pieces += [("answer", " Rome"), ("answer", " ")]
    text = shown(
        *(Delta.model_validate({"kind": kind, "turn": 0, "text": piece}) for kind, piece in pieces),
        end=record("Rome", sources=[SourcePassage(number=1, id="7", title="Italy")]),
    )
    assert text == "think       I know it.\nanswer      Rome\n\nRome\nContained in\n[1] Italy\n"


def test_it_says_when_there_is_no_answer_or_no_source() -> None:
    notice = Notice(turn=0, text="My previous action is invalid.")
    text = shown(notice, end=record(None))
    assert text == "notice      My previous action is invalid.\n\nNo answer: it has no turn left.\n"
    assert shown(end=record("Rome")).endswith("Rome\nNo retrieved passage contains this answer.\n")


def test_it_says_which_words_no_passage_has() -> None:
    unknown = {"unknown_words": ["Marie", "Cu\x1brie"]}
    said = "\nBut no passage that was found has Marie, Cu\N{REPLACEMENT CHARACTER}rie.\n"
    assert shown(end=record("Rome", **unknown)).endswith(f"contains this answer.{said}")
    assert shown(end=record(None, **unknown)).endswith(f"it has no turn left.{said}")


def test_without_a_question_it_proposes_some(
    indexed_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(indexed_project)
    dev = [read_questions(file) for file in Path("data/questions").glob("*/dev.jsonl")]
    known = {shlex.quote(question.question) for each in dev for question in each}
    print_examples()
    first, *proposed = capsys.readouterr().out.splitlines()
    assert first.endswith("For example:") and len(proposed) == 3
    assert {line.removeprefix("    dgpo ask ") for line in proposed} <= known
    make_project(tmp_path)
    (tmp_path / "data/index").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="what do you want to know"):
        print_examples()


def test_control_sequences_of_models_and_documents_do_not_reach_the_terminal() -> None:
    evil = "a\x1b[2J\x9b\u202eb\r"
    passages = [RetrievedPassage(id="1", title=evil, text="long " * 40, score=1.0)]
    text = shown(
        Delta(kind="think", turn=0, text=evil),
        SearchResult(turn=0, query="q", passages=passages),
        end=record(evil, sources=[SourcePassage(number=1, id="1", title=evil)]),
        terminal=True,
    )
    assert not set("\x1b\x9b\u202e\r") & set(text)
    assert all(len(line) <= 40 for line in text.splitlines() if "long" in line)
    assert printable("one\n\ttwo é 東") == "one\n\ttwo é 東"


def test_markup_stays_text_and_wide_letters_stay_on_their_line() -> None:
    passages = [RetrievedPassage(id="1", title="[red]x[/red] :smile:", text="東京" * 40, score=1.0)]
    found = SearchResult(turn=0, query="q", passages=passages)
    text = shown(found, end=record("[bold]Rome"), terminal=True)
    assert "[red]x[/red] :smile:" in text and "[bold]Rome" in text
    assert [cell_len(line) for line in text.splitlines() if "東" in line] == [40]
