"""Episodes as traces in a real sqlite store, as MLflow's own client finds them again."""

import json
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.agent.episode import Episode
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.config.agent import GREEDY, ProtocolConfig
from dgpo_core.datasets.records import Question
from dgpo_core.world.tokenizer import build_tokenizer
from tasks.stages.stage import stage
from tasks.tracking.runs import connect
from tasks.tracking.traces import TRAINING_EPISODES, trace_episodes, traced
from tests.conftest import make_workplace
from tests.dgpo_core.agent.scripted import Answering, ScriptedEngine

SEARCH = "<think> I need it. </think>\n<search> birthplace of Ada </search>"
ANSWER = "<think> yes. </think>\n<answer> Ada Paris </answer>"
TOKENIZER = build_tokenizer()


def episodes(count: int, retriever: Answering | None = None) -> list[Episode]:
    """Episodes of two turns whose answer has F1 2/3, of two data sets."""
    engine = ScriptedEngine(TOKENIZER, lambda _, turn: [SEARCH, ANSWER][min(turn, 1)])
    loop = AgentLoop(engine, TOKENIZER, retriever or Answering(), ProtocolConfig(), 3)
    questions = [Question(f"q{number}", "Where was Ada born", ("Paris",)) for number in range(count)]
    return loop.run([Task(each, "onehop" if i % 2 else "rare") for i, each in enumerate(questions)], GREEDY)


def traces(name: str) -> list[Any]:
    """The traces of the stage's last run, newest first."""
    client = connect()
    run = json.loads(Path(f"runs/{name}/run.json").read_text())["mlflow_run"]
    experiment = client.get_run(run).info.experiment_id
    return list(client.search_traces(locations=[experiment], run_id=run, max_results=100))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, mlflow_store: str) -> list[Any]:
    """The traces of an evaluation with four good episodes and one that failed."""
    with pytest.MonkeyPatch.context() as patch:
        make_workplace(tmp_path_factory.mktemp("traces"), patch, mlflow_store)
        patch.setattr("tenacity.nap.time.sleep", lambda _: None)
        (failed,) = episodes(1, Answering(failures=9))
        failed.question_id = "broken"
        with stage("evaluate@kd", config={}) as run:
            trace_episodes(run, [*episodes(9), failed], TOKENIZER.decode, limit=5)
        return traces("evaluate@kd")


def test_a_trace_has_the_episodes_tree_and_scores(evaluated: list[Any]) -> None:
    good = [trace for trace in evaluated if trace.info.state == "OK"]
    assert sorted(trace.info.tags["dataset"] for trace in good) == ["onehop"] * 2 + ["rare"] * 2
    trace = good[0]
    root, *children = trace.data.spans
    assert (root.span_type, root.parent_id) == ("AGENT", None)
    assert (root.inputs, root.outputs) == ({"question": "Where was Ada born"}, {"answer": "Ada Paris"})
    assert [span.span_type for span in children] == ["LLM", "RETRIEVER", "LLM"]
    assert {span.parent_id for span in children} == {root.span_id}
    assert children[1].outputs == [
        {
            "page_content": "Ada was born in Paris.",
            "metadata": {"doc_id": "7", "title": "Ada", "score": 9.0},
            "id": "7",
        }
    ]
    usage = [span.attributes["mlflow.chat.tokenUsage"] for span in (children[0], children[2])]
    assert trace.info.token_usage["output_tokens"] == sum(each["output_tokens"] for each in usage)
    assert {"stage": "evaluate@kd", "model": "kd", "outcome": "wrong"}.items() <= trace.info.tags.items()
    scores = {each.name: each.value for each in trace.info.assessments}
    assert scores == {"golden_answers": ["Paris"], "em": False, "f1": pytest.approx(2 / 3), "hit": True}


def test_a_failed_episode_is_an_error_without_scores(evaluated: list[Any]) -> None:
    (trace,) = [trace for trace in evaluated if trace.info.state != "OK"]
    assert (trace.info.state, trace.info.tags["question_id"]) == ("ERROR", "broken")
    assert trace.data.spans[0].status.description == "the index is down"
    assert [span.status.status_code for span in trace.data.spans] == ["ERROR", "OK", "ERROR"]
    assert [each.name for each in trace.info.assessments] == ["golden_answers"]


def test_training_traces_are_those_of_the_steps_asked_for_and_once(workplace: Path) -> None:
    def train(run: Any, steps: range) -> None:
        rollout = traced(run, lambda _, step: episodes(20), TOKENIZER.decode, every=2, limit=40)
        for step in steps:
            assert len(rollout([], step)) == 20

    with pytest.raises(RuntimeError), stage("reinforce@dgpo", config={}) as run:
        train(run, range(4))
        raise RuntimeError
    with stage("reinforce@dgpo", config={}) as run:  # goes on from step 3, and makes step 4 again
        train(run, range(3, 5))
    found = traces("reinforce@dgpo")
    assert sorted(trace.info.tags["step"] for trace in found) == ["2"] * TRAINING_EPISODES + ["4"] * (
        TRAINING_EPISODES
    )
    assert {len(trace.data.spans) for trace in found} == {4}
    assert {len(trace.info.assessments) for trace in found} == {4}


def test_none_are_made_when_none_are_asked_for(workplace: Path) -> None:
    with stage("evaluate@kd", config={}) as run:
        trace_episodes(run, episodes(2), TOKENIZER.decode, limit=0)
    assert traces("evaluate@kd") == []


def test_a_broken_store_costs_one_warning(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-scheme://nowhere")
    with stage("evaluate@kd", config={}, outputs=[Path("out")]) as run:
        trace_episodes(run, episodes(2), TOKENIZER.decode, limit=2)
        Path("out").touch()
    assert Path("out").exists()
    assert capsys.readouterr().err.count("warning: MLflow does not record") == 1
