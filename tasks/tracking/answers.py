"""Answered questions of `dgpo serve` as MLflow traces, and thumbs as feedback on them.

A trace has a span for each turn of the model and for each search. A thread of its own sends them, which
imports MLflow with the first answer; when the store fails, that is said once and answers are lost, but none
waits.
"""

import queue
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from dgpo_core.serving.events import EpisodeStep
from dgpo_core.serving.recording import AnsweredQuestion, Period, Rating
from tasks.tracking.runs import connect
from tasks.tracking.store import EXPERIMENT, explained, prepare, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Trace
    from mlflow.tracing.client import TracingClient

    from tasks.tracking.traces import EpisodeSpan

WAITING = 1000  # answers and thumbs that may wait for a slow store; further ones are lost
KNOWN = 10_000  # latest answers that may be rated
GRACE = 5.0  # seconds that the end waits for what is still to be sent
MAX_PREVIEW = 1000  # characters, by MLflow's limit
THUMB, VISITOR = "thumb", "visitor"
ENVIRONMENT = ("information", "notice")  # steps that the model did not write

Job = Callable[["TracingClient", str], None]


class AnswerRecorder:
    """A Recorder that sends to MLflow's experiment of ours."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue(WAITING)
        self._known: OrderedDict[str, str | None] = (
            OrderedDict()
        )  # response -> its assessment, once it has one
        self._store: tuple[TracingClient, str] | None = None  # with the experiment's id
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def keep(self, answered: AnsweredQuestion) -> None:
        """Have the answer sent, unless too many wait."""
        if self._submit(partial(_send, answered)):
            self._known[answered.id] = None
            while len(self._known) > KNOWN:
                self._known.popitem(last=False)

    def rate(self, rating: Rating) -> bool:
        """Have the rating sent, after its answer; False if that is not known, or when too many wait."""
        return rating.id in self._known and self._submit(partial(self._send_rating, rating))

    def close(self) -> None:
        """Send what waits, as far as that takes GRACE seconds."""
        with suppress(queue.Full):
            self._jobs.put(None, timeout=GRACE)
            self._thread.join(GRACE)

    def _submit(self, job: Job) -> bool:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    def _work(self) -> None:
        self._attempt(lambda: prepare(tracking_uri()))  # to make a local one takes a while
        while (job := self._jobs.get()) is not None:
            self._attempt(partial(self._do, job))
            self._jobs.task_done()

    def _do(self, job: Job) -> None:
        self._store = self._store or _open()
        job(*self._store)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
            self._failing = False
        except Exception as error:
            self._store = None
            if not self._failing:
                said = f"warning: MLflow does not keep answers: {explained(error)}"
                with suppress(OSError):  # the terminal may be closed by now
                    print(said, file=sys.stderr, flush=True)
            self._failing = True

    def _send_rating(self, rating: Rating, store: "TracingClient", _experiment: str) -> None:
        from mlflow.entities import AssessmentSource, Feedback

        trace, good = trace_id(rating.id), rating.thumb == "up"
        source = AssessmentSource("HUMAN", VISITOR)
        made = Feedback(THUMB, good, source=source, trace_id=trace, rationale=rating.comment)
        earlier = self._known.get(rating.id)
        if earlier is not None:
            store.update_assessment(trace, earlier, made)
        elif (new := store.log_assessment(trace, made).assessment_id) and rating.id in self._known:
            self._known[rating.id] = new


def trace_id(response: str) -> str:
    """Return the trace of a response: both ids have the same number."""
    return f"tr-{response.rpartition('-')[2]}"


def _open() -> tuple["TracingClient", str]:
    from mlflow.tracing.client import TracingClient

    experiment = connect().get_experiment_by_name(EXPERIMENT)
    assert experiment is not None, "connect() creates it"
    return TracingClient(tracking_uri()), str(experiment.experiment_id)


def _send(answered: AnsweredQuestion, store: "TracingClient", experiment: str) -> None:
    trace = make_trace(answered, experiment)
    store.start_trace(trace.info)
    store.log_spans(experiment, trace.data.spans)


def make_trace(answered: AnsweredQuestion, experiment: str) -> "Trace":
    """Make MLflow's entities for one answer."""
    from mlflow.entities import Trace, TraceData, TraceInfo, TraceLocation, TraceState

    from tasks.tracking.traces import make_span

    episode, trace = answered.episode, trace_id(answered.id)
    start, end = _nanoseconds(answered.asked)
    number = bytes.fromhex(trace.removeprefix("tr-"))
    info = TraceInfo(
        trace_id=trace,
        trace_location=TraceLocation.from_experiment_id(experiment),
        request_time=start // 1_000_000,
        execution_duration=(end - start) // 1_000_000,
        state=TraceState.OK,
        request_preview=episode.question[:MAX_PREVIEW],
        response_preview=(episode.answer or "")[:MAX_PREVIEW],
        tags={
            "kind": "served",
            "model": episode.model,
            "ending": str(episode.ending),
            "mlflow.traceName": "served question",
        },
    )
    spans = [make_span(number, place, start, span) for place, span in enumerate(answer_spans(answered))]
    return Trace(info, TraceData(spans=spans))


def answer_spans(answered: AnsweredQuestion) -> "list[EpisodeSpan]":
    """Cut an answer into its root, its turns, and after each the search that it asked for."""
    from tasks.tracking.traces import EpisodeSpan

    episode = answered.episode
    attributes: dict[str, Any] = {
        "ending": str(episode.ending),
        "sources": [source.model_dump(mode="json") for source in episode.sources],
        "unknown_words": episode.unknown_words,
        "temperature": episode.temperature,
        "seed": episode.seed,
        "model_tokens": episode.model_tokens,
    }
    asked, answer = {"question": episode.question}, {"answer": episode.answer}
    period = _nanoseconds(answered.asked)
    found = [EpisodeSpan("served question", "AGENT", asked, answer, attributes, period=period)]
    searches = {search.turn: search for search in episode.searches}
    steps: dict[int, list[EpisodeStep]] = {}
    for step in episode.steps:
        own = steps.setdefault(step.turn, [])
        own += [step] if step.kind not in ENVIRONMENT else []
    for turn, written in steps.items():
        text = [{"kind": step.kind, "text": step.text} for step in written]
        period = _nanoseconds(answered.turns.get(turn, answered.asked))
        found.append(EpisodeSpan(f"turn {turn + 1}", "LLM", asked, text, {"turn": turn + 1}, period=period))
        if search := searches.get(turn):
            documents = [
                {
                    "page_content": passage.text,
                    "metadata": {
                        "doc_id": passage.id,
                        "title": passage.title,
                        "score": round(passage.score, 4),
                    },
                    "id": passage.id,
                }
                for passage in search.passages
            ]
            query, period = {"query": search.query}, _nanoseconds(answered.searches.get(turn, answered.asked))
            found.append(EpisodeSpan(f"search {turn + 1}", "RETRIEVER", query, documents, period=period))
    return found


def _nanoseconds(period: Period) -> tuple[int, int]:
    start, end = period
    return round(start * 1e9), round(end * 1e9)
