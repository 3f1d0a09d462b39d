"""Episodes as MLflow traces: what the model wrote, searched and found, with its scores.

A root AGENT span with question and answer; below it an LLM span for each turn and a RETRIEVER span for each
search. Episodes run in batches and keep no times, so all spans have the moment in which they were recorded,
in the episode's order. Imports mlflow's entities; a store that fails costs one warning and no stage.
"""

import base64
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dgpo_core.agent.actions import ActionKind, parse_action
from dgpo_core.agent.answers import token_f1
from dgpo_core.agent.episode import Decode, Episode, Outcome, Search
from dgpo_core.agent.prompts import INFORMATION_END, INFORMATION_START
from dgpo_core.reporting.episodes import sample_questions
from dgpo_core.training.episode_sources import Rollout
from tasks.stages.stage import Run
from tasks.tracking.lineage import stage_labels
from tasks.tracking.runs import warn
from tasks.tracking.store import tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Span, Trace
    from mlflow.entities.assessment import Assessment


@dataclass(frozen=True)
class EpisodeSpan:
    """A span of the episode, of one of MLflow's types; `error` is why it failed.

    `period` is start and end in nanoseconds since the epoch, where they are known.
    """

    name: str
    kind: Literal["AGENT", "LLM", "RETRIEVER"]
    inputs: Any
    outputs: Any
    attributes: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    period: tuple[int, int] | None = None


def sample(episodes: list[Episode], limit: int) -> list[Episode]:
    """Choose at most `limit` episodes: failed ones first, then evenly over data sets, one a question.

    The questions are those of the report's reader, and so the same for every model.
    """
    failed = [episode for episode in episodes if episode.outcome is Outcome.FAILED][:limit]
    others = {(e.dataset, e.question_id): e for e in reversed(episodes) if e.outcome is not Outcome.FAILED}
    chosen = sample_questions(sorted(others), limit)[: limit - len(failed)]
    return failed + [others[key] for key in chosen]


def episode_spans(episode: Episode, decode: Decode) -> list[EpisodeSpan]:
    """Cut the episode into the turns of the model, each followed by the search that it asked for.

    The input of a turn is all that stood before it. A search that was asked for and not answered because
    the retriever failed is a step with an error; after the last turn none is asked.
    """
    found: list[EpisodeSpan] = []
    searches = iter(episode.searches)
    for number, turn in enumerate(episode.turns, 1):
        text = decode(episode.token_ids[turn.start : turn.end])
        action = parse_action(text)
        written = turn.end - turn.start
        usage = {"input_tokens": turn.start, "output_tokens": written, "total_tokens": turn.end}
        attributes = {"turn": number, "action": str(action.kind), "mlflow.chat.tokenUsage": usage}
        prompt = decode(episode.token_ids[: turn.start])
        found.append(EpisodeSpan(f"turn {number}", "LLM", {"prompt": prompt}, text, attributes))
        if action.kind is not ActionKind.SEARCH:
            continue
        query = {"query": action.content}
        if search := next(searches, None):
            shown = decode(episode.token_ids[turn.end : turn.reply_end])
            outputs, hit = documents(search, shown), {"hit": search.hit}
            found.append(EpisodeSpan(f"search {number}", "RETRIEVER", query, outputs, hit))
        elif episode.failure is not None:
            found.append(EpisodeSpan(f"search {number}", "RETRIEVER", query, [], error=episode.failure))
    return found


def documents(search: Search, shown: str) -> list[dict[str, Any]]:
    """Write what a search found in MLflow's form of documents, with the text that the model was shown.

    A passage for which there was no room left has empty contents.
    """
    rest = shown.partition(INFORMATION_START)[2].rpartition(INFORMATION_END)[0]
    found = []
    for number, (passage, score) in enumerate(zip(search.passage_ids, search.scores, strict=True), 1):
        own, following, rest = rest.partition(f"\nDoc {number + 1}(Title: ")
        rest = following.lstrip("\n") + rest
        title, content = _split_title(own.removeprefix(f"Doc {number}(Title: "))
        metadata = {"doc_id": passage, "title": title, "score": round(score, 4)}
        found.append({"page_content": content.strip(), "metadata": metadata, "id": passage})
    return found


def _split_title(document: str) -> tuple[str, str]:
    """Split `title) text` into title and text; a title may hold brackets itself."""
    depth = 1
    for place, character in enumerate(document):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return document[:place], document[place + 1 :]
    return "", document


TRAINING_EPISODES = 8  # of a step of reinforcement learning
MAX_NAME, MAX_PREVIEW = 250, 1000  # characters, by MLflow's limits
SCORER = "dgpo_core.agent.answers"  # who gave an episode its scores


@dataclass(frozen=True)
class EpisodeTrace:
    """An episode made ready on the stage's thread: the tokenizer must not be used by two at a time."""

    episode: Episode
    spans: list[EpisodeSpan]
    tags: dict[str, str]


def trace_episodes(
    run: Run, episodes: list[Episode], decode: Decode, limit: int, tags: Mapping[str, str] | None = None
) -> None:
    """Record a sample of at most `limit` episodes under the stage's run; returns before they are sent."""
    tags = {"stage": run.stage, **stage_labels(run.stage), **(tags or {})}
    try:
        recorded = [
            EpisodeTrace(each, episode_spans(each, decode), dict(tags)) for each in sample(episodes, limit)
        ]
    except Exception as error:  # the episodes are good and paid for, whatever stands in their way here
        warn(error)
        return
    if recorded:
        run.tracker.submit(lambda client, run_id: send(client, run_id, recorded))


def traced(run: Run, rollout: Rollout, decode: Decode, every: int, limit: int) -> Rollout:
    """Record a few episodes of each `every`-th step of `rollout`: TRAINING_EPISODES, `limit` at most."""

    def remembered(questions: list[int], step: int) -> list[Episode]:
        episodes = rollout(questions, step)
        if (step + 1) % every == 0:
            few = min(limit, TRAINING_EPISODES)
            trace_episodes(run, episodes, decode, few, {"step": str(step + 1)})
        return episodes

    return remembered


def send(client: "MlflowClient", run_id: str, recorded: list[EpisodeTrace]) -> None:
    """Store the traces, linked to the run. The same episode of the same run is the same trace."""
    from mlflow.tracing.client import TracingClient

    experiment = client.get_run(run_id).info.experiment_id
    store = TracingClient(tracking_uri())
    traces = [make_trace(each, experiment, run_id) for each in recorded]
    for trace in traces:
        store.start_trace(trace.info)
    store.log_spans(experiment, [span for trace in traces for span in trace.data.spans])


def make_trace(recorded: EpisodeTrace, experiment: str, run_id: str) -> "Trace":
    """Make MLflow's entities for one episode."""
    from mlflow.entities import Trace, TraceData, TraceInfo, TraceLocation, TraceState

    episode = recorded.episode
    key = [run_id, recorded.tags.get("step"), episode.dataset, episode.question_id, episode.sample]
    number = hashlib.sha256(json.dumps(key).encode()).digest()[:16]
    name = f"{episode.dataset} {episode.question_id}"[:MAX_NAME]
    failed = episode.outcome is Outcome.FAILED
    now = time.time_ns()
    attributes = {
        "golden_answers": episode.golden_answers,
        "outcome": str(episode.outcome),
        "ending": str(episode.ending),
        "well_formed": episode.well_formed,
        "invalid_actions": episode.invalid_actions,
    }
    question, answer = {"question": episode.question}, {"answer": episode.prediction}
    root = EpisodeSpan(name, "AGENT", question, answer, attributes, error=episode.failure if failed else None)
    spans = [make_span(number, place, now, span) for place, span in enumerate([root, *recorded.spans])]
    info = TraceInfo(
        trace_id=f"tr-{number.hex()}",
        trace_location=TraceLocation.from_experiment_id(experiment),
        request_time=now // 1_000_000,
        execution_duration=0,
        state=TraceState.ERROR if failed else TraceState.OK,
        request_preview=episode.question[:MAX_PREVIEW],
        response_preview=((episode.failure if failed else episode.prediction) or "")[:MAX_PREVIEW],
        trace_metadata={"mlflow.sourceRun": run_id},
        tags={
            **recorded.tags,
            "dataset": episode.dataset,
            "question_id": episode.question_id,
            "outcome": str(episode.outcome),
            "mlflow.traceName": name,
        },
        assessments=_assessments(episode, f"tr-{number.hex()}"),
    )
    return Trace(info, TraceData(spans=spans))


def _assessments(episode: Episode, trace: str) -> "list[Assessment]":
    """Return the golden answers, and the scores of an episode that did not fail."""
    from mlflow.entities import AssessmentSource, Expectation, Feedback

    source = AssessmentSource("CODE", SCORER)
    made: list[Assessment] = [
        Expectation("golden_answers", episode.golden_answers, source=source, trace_id=trace)
    ]
    if episode.outcome is not Outcome.FAILED:
        f1 = token_f1(episode.prediction, episode.golden_answers)
        scores = {"em": episode.correct, "f1": round(f1, 6), "hit": episode.hit}
        made += [Feedback(name, value, source=source, trace_id=trace) for name, value in scores.items()]
    for each in made:  # of its own trace and name: sent twice, it is one
        each.assessment_id = "a-" + hashlib.sha256(f"{trace} {each.name}".encode()).hexdigest()[:32]
    return made


def make_span(trace: bytes, place: int, now: int, step: EpisodeSpan) -> "Span":
    """Make span number `place` of a trace, 0 the root; starts a microsecond apart keep their order."""
    from mlflow.entities import Span

    attributes = {
        **step.attributes,
        "mlflow.traceRequestId": f"tr-{trace.hex()}",
        "mlflow.spanType": step.kind,
        "mlflow.spanInputs": step.inputs,
        "mlflow.spanOutputs": step.outputs,
    }
    start, end = step.period or (now + place * 1000, now + (place + 1) * 1000)
    status = {"code": "STATUS_CODE_ERROR" if step.error else "STATUS_CODE_OK", "message": step.error or ""}
    return Span.from_dict(
        {
            "trace_id": _base64(trace),
            "span_id": _span_id(trace, place),
            "parent_span_id": _span_id(trace, 0) if place else None,
            "name": step.name,
            "start_time_unix_nano": start,
            "end_time_unix_nano": end,
            "events": [],
            "status": status,
            "attributes": {key: json.dumps(value) for key, value in attributes.items()},
        }
    )


def _span_id(trace: bytes, place: int) -> str:
    return _base64(hashlib.sha256(trace + place.to_bytes(4)).digest()[:8])


def _base64(number: bytes) -> str:
    return base64.b64encode(number).decode()
