"""Answers of the service as MLflow's own client reads them, and a store that fails."""

import time
import uuid
from pathlib import Path

import pytest

from dgpo_core.agent.episode import Ending
from dgpo_core.serving.events import EpisodeRecord, EpisodeStep, RetrievedPassage, SearchResult, SourcePassage
from dgpo_core.serving.recording import AnsweredQuestion, Rating
from tasks.tracking import answers
from tasks.tracking.answers import AnswerRecorder, trace_id

PASSAGE = RetrievedPassage(id="p1", title="Ada (engineer)", text="Ada was born in Rana.", score=1.25)


def answer() -> AnsweredQuestion:
    """Two turns: a search of half a second after one of a second, then the answer."""
    record = EpisodeRecord(
        question="Where was Ada born?",
        model="dgpo",
        answer="Rana",
        sources=[SourcePassage(number=1, id="p1", title="Ada (engineer)")],
        unknown_words=[],
        ending=Ending.ANSWERED,
        failure=None,
        steps=[
            EpisodeStep(kind="think", turn=0, text="I need Ada."),
            EpisodeStep(kind="search", turn=0, text="Ada born"),
            EpisodeStep(kind="information", turn=0, text="Doc 1"),
            EpisodeStep(kind="answer", turn=1, text="Rana"),
        ],
        searches=[SearchResult(turn=0, query="Ada born", passages=[PASSAGE])],
        response="",
        well_formed=True,
        invalid_actions=0,
        temperature=0.0,
        seed=0,
        model_tokens=9,
        other_tokens=20,
    )
    turns, searches = {0: (100.0, 101.0), 1: (101.5, 102.0)}, {0: (101.0, 101.5)}
    return AnsweredQuestion(f"chatcmpl-{uuid.uuid4().hex}", record, (100.0, 102.0), turns, searches)


def test_an_answer_is_a_trace_and_the_latest_thumb_its_feedback(workplace: Path) -> None:
    from mlflow import MlflowClient

    kept, recorder = answer(), AnswerRecorder()
    recorder.keep(kept)
    assert recorder.rate(Rating(id=kept.id, thumb="up"))
    assert recorder.rate(Rating(id=kept.id, thumb="down", comment="It was Velmora"))
    assert not recorder.rate(Rating(id="chatcmpl-" + "0" * 32, thumb="up"))
    recorder._jobs.join()
    recorder.close()
    trace = MlflowClient().get_trace(trace_id(kept.id))
    assert (trace.info.request_preview, trace.info.response_preview) == ("Where was Ada born?", "Rana")
    assert (trace.info.execution_duration, trace.info.tags["model"]) == (2000, "dgpo")
    spans = {span.name: span for span in trace.data.spans}
    assert list(spans) == ["served question", "turn 1", "search 1", "turn 2"]
    found = spans["search 1"]
    assert (found.span_type, found.inputs) == ("RETRIEVER", {"query": "Ada born"})
    assert found.outputs[0]["metadata"] == {"doc_id": "p1", "title": "Ada (engineer)", "score": 1.25}
    assert (found.end_time_ns - found.start_time_ns, found.parent_id) == (
        5e8,
        spans["served question"].span_id,
    )
    assert [step["kind"] for step in spans["turn 1"].outputs] == ["think", "search"]
    [thumb] = [each for each in trace.info.assessments if each.name == "thumb"]
    assert (thumb.feedback.value, thumb.rationale) == (False, "It was Velmora")
    assert thumb.source.source_type == "HUMAN"


def test_a_store_that_fails_is_said_once_and_nobody_waits(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(answers, "connect", fails)
    recorder, kept = AnswerRecorder(), answer()
    for _ in range(3):
        recorder.keep(kept)
    assert recorder.rate(Rating(id=kept.id, thumb="up"))
    recorder._jobs.join()
    recorder.close()
    said = capsys.readouterr().err
    assert said.count("warning: MLflow does not keep answers") == 1 and "nobody there" in said


def test_a_store_that_never_answers_costs_answers_and_no_time(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "connect", lambda: time.sleep(60))
    monkeypatch.setattr(answers, "GRACE", 0.05)
    monkeypatch.setattr(answers, "WAITING", 2)
    recorder, kept = AnswerRecorder(), [answer() for _ in range(9)]
    for each in kept:
        recorder.keep(each)
    assert not recorder.rate(Rating(id=kept[-1].id, thumb="up"))  # it was lost
    recorder.close()
