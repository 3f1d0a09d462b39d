"""`dgpo ask` as its user types it, with the committed teacher and a real index."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dgpo_core.datasets.records import Question, read_questions
from dgpo_core.protocol.episode import Ending
from dgpo_core.serving.events import Delta, Found, Information, Notice, Record, Source
from tasks.ask import Screen, printable
from tasks.data import generate
from tasks.index import index
from tests.conftest import ROOT, make_workplace
from tests.tasks.miniature import make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, mlflow_store: str) -> Path:
    """Data, index and the teacher."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        make_workplace(folder, patch, mlflow_store)
        make_project(folder)
        generate()
        index()
    return folder


@pytest.fixture(scope="module")
def question(project: Path) -> Question:
    return read_questions(project / "data/questions/onehop/test.jsonl")[0]


def dgpo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tasks.cli", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_the_episode_in_plain_text_and_as_json(project: Path, question: Question) -> None:
    plain = dgpo(project, "ask", question.question, "--model", "teacher")
    assert plain.returncode == 0, plain.stderr
    assert plain.stderr == "" and "\x1b" not in plain.stdout
    asked = dgpo(project, "ask", question.question, "--model", "teacher", "--json")
    record = Record.model_validate_json(asked.stdout)
    assert record.question == question.question and record.model == "teacher"
    lines = plain.stdout.splitlines()
    labels = [line.split()[0] for line in lines[: lines.index("")] if not line.startswith(" ")]
    assert labels == [step.kind for step in record.steps]
    for search in record.searches:
        assert f"search      {search.query}" in lines
        assert all(f"{p.title}: {p.text}" in plain.stdout for p in search.passages), (
            "not cut without a terminal"
        )
    sources = [f"[{source.number}] {source.title}" for source in record.sources]
    assert lines[lines.index("") + 1 :] == [
        record.answer,
        *(sources or ["No retrieved passage contains this answer."]),
    ]


def test_errors_are_one_line(project: Path, tmp_path: Path, question: Question) -> None:
    make_project(tmp_path)
    empty = dgpo(tmp_path, "ask", "Who", "--model", "teacher")
    assert empty.stderr == "error: data/index/manifest.json: no such file; run the index stage first\n"
    assert empty.returncode == 2
    limit = dgpo(project, "ask", question.question, "--model", "teacher", "--max-searches", "3")
    assert limit.stderr == "error: searches: between 0 and protocol.max_turns (2), not 3\n"
    assert limit.returncode == 2


def test_a_retriever_that_is_down_is_said_in_one_line(project: Path, tmp_path: Path) -> None:
    make_project(tmp_path, retrieval={"location": "http://127.0.0.1:9"})
    (tmp_path / "data").symlink_to(project / "data")
    down = dgpo(tmp_path, "ask", "Who", "--model", "teacher")
    assert down.returncode == 1 and down.stdout == ""
    (line,) = down.stderr.splitlines()
    assert line.startswith(
        "error: no answer, because the retriever failed: cannot fill the Qdrant collection"
    )


def record(answer: str | None, **more: object) -> Record:
    plain = dict.fromkeys(("failure",)) | {"sources": [], "steps": [], "searches": [], "response": ""}
    rest = {
        "question": "q",
        "model": "m",
        "ending": Ending.BUDGET,
        "well_formed": False,
        "invalid_actions": 1,
    }
    numbers = {"temperature": 0.0, "seed": 0, "model_tokens": 1, "other_tokens": 1}
    return Record.model_validate({**plain, **rest, **numbers, "answer": answer, **more})


def shown(*events: Delta | Information | Notice, end: Record, terminal: bool = False) -> str:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=40, force_terminal=terminal, color_system=None, highlight=False))
    for event in events:
        screen.show(event)
    screen.close(end)
    return out.getvalue()


def test_deltas_become_paragraphs_without_spaces_at_their_ends() -> None:
    pieces = [
        ("text", " "),
        ("think", " I"),
        ("think", " know "),
        ("think", "it. "),
        ("answer", " Rome"),
        ("answer", " "),
    ]
    text = shown(
        *(Delta.model_validate({"kind": kind, "turn": 0, "text": piece}) for kind, piece in pieces),
        end=record("Rome", sources=[Source(number=1, id="7", title="Italy")]),
    )  # fmt: skip
    assert text == "think       I know it.\nanswer      Rome\n\nRome\n[1] Italy\n"


def test_it_says_when_there_is_no_answer_or_no_source() -> None:
    notice = Notice(turn=0, text="My previous action is invalid.")
    text = shown(notice, end=record(None))
    assert text == "notice      My previous action is invalid.\n\nNo answer: it has no turn left.\n"
    assert shown(end=record("Rome")).endswith("Rome\nNo retrieved passage contains this answer.\n")


def test_control_sequences_of_models_and_documents_do_not_reach_the_terminal() -> None:
    evil = "a\x1b[2J\x9b\u202eb\r"
    passages = [Found(id="1", title=evil, text="long " * 40, score=1.0)]
    text = shown(
        Delta(kind="think", turn=0, text=evil),
        Information(turn=0, query="q", passages=passages),
        end=record(evil, sources=[Source(number=1, id="1", title=evil)]),
        terminal=True,
    )
    assert not set("\x1b\x9b\u202e\r") & set(text)
    assert max(map(len, text.splitlines())) <= 40
    assert printable("one\n\ttwo é 東") == "one\n\ttwo é 東"


def test_json_holds_nothing_but_the_record(project: Path) -> None:
    unasked = dgpo(project, "ask", "Who", "--model", "teacher", "--json", "--max-searches", "0")
    assert json.loads(unasked.stdout)["answer"] is None and unasked.returncode == 0
