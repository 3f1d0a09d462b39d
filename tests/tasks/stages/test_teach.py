"""Where no teacher knows the protocol: a scripted expert, or a model behind an endpoint, and what follows."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from dgpo_core.agent.episode import Outcome, read_episodes, write_episodes
from dgpo_core.config.params import load_params
from dgpo_core.datasets.records import Question, read_questions, write_jsonl
from dgpo_core.errors import UserError
from dgpo_core.models import load_tokenizer
from dgpo_core.training.teacher_cache import CERTIFICATE
from tasks.commands.preflight import preflight
from tasks.commands.use import use
from tasks.project.paths import CORRECT_EPISODES, DISTRIBUTIONS, MODELS, TEACHER_EPISODES, questions_file
from tasks.stages.distill import distill
from tasks.stages.distributions import distributions
from tasks.stages.filter import filter_episodes
from tasks.stages.given import link
from tasks.stages.teach import teach
from tests.dgpo_core.making import random_episode
from tests.endpoint import Body, endpoint
from tests.tasks.commands.test_preflight import other_vocabulary
from tests.tasks.miniature import ROOT, change_params, make_project

SEQKD = {"recipes": {"distill": {"seqkd": {"start": "student", "objective": "ce"}}, "reinforce": {}}}


def project(indexed: Path, folder: Path, recipes: list[str]) -> None:
    """Data and index of the miniature, and parameters with these rows."""
    make_project(
        folder, recipes, teach={"questions": 6, "chunk": 4}, distill={"epochs": 1, "dev_questions": 2}
    )
    for name in ("data", ".index"):
        if (indexed / name).exists():
            shutil.copytree(indexed / name, folder / name)


@pytest.mark.thorough
def test_an_expert_teaches_and_the_teacher_gives_distributions(
    workplace: Path, indexed_project: Path
) -> None:
    """As with a teacher's own episodes: correct ones are kept, and KD learns from distributions on them."""
    project(indexed_project, workplace, ["kd"])
    change_params(teach={"policy": "expert"}, protocol={"max_turns": 4})
    teach()
    raw = read_episodes(TEACHER_EPISODES)
    assert {run.dataset for run in raw} == {"onehop", "twohop"} and len(raw) == 12
    gold = {
        question.id: [passage["text"] for passage in question.metadata["golden_passages"]]
        for name in ("onehop", "twohop")
        for question in read_questions(questions_file(name, "train"))
    }
    seen = [all(text in run.response for text in gold[run.question_id]) for run in raw]
    assert [run.correct for run in raw] == seen and sum(seen) >= 8, (
        "it is right where it has found the evidence"
    )
    filter_episodes()
    assert read_episodes(CORRECT_EPISODES) == [run for run in raw if run.correct]
    distributions()
    distill("kd")
    assert (MODELS / "kd/model.safetensors").is_file()
    assert json.loads((DISTRIBUTIONS / CERTIFICATE).read_text())["episodes"] == len(raw)


@pytest.mark.thorough
def test_an_expert_teaches_a_student_whose_teacher_has_other_tokens(
    workplace: Path, indexed_project: Path
) -> None:
    """Its episodes are in the student's tokens, which is all that SeqKD asks for; KD is refused."""
    project(indexed_project, workplace, ["seqkd"])
    other_vocabulary(workplace)
    change_params(teach={"policy": "expert", "questions": 2})
    preflight()
    teach()
    decode = load_tokenizer("models/student").decode
    assert all("<search>" in decode(run.token_ids) for run in read_episodes(TEACHER_EPISODES))
    filter_episodes()
    distributions()
    assert json.loads((DISTRIBUTIONS / CERTIFICATE).read_text()) == {"teacher": "other vocabulary"}
    distill("seqkd")
    change_params(recipes={"distill": {"kd": {"start": "student", "objective": "kd"}}})
    with pytest.raises(UserError, match="different tokenizers"):
        preflight()


@pytest.mark.thorough
def test_an_endpoint_teaches_and_goes_on_where_it_was_cut_off(
    workplace: Path, indexed_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second chunk fails as a whole: what is done is not asked for again."""
    project(indexed_project, workplace, ["seqkd"])
    answers = {
        each.question: each.golden_answers[0]
        for name in ("onehop", "twohop")
        for each in read_questions(questions_file(name, "train"))
    }
    down = [True]

    def say(body: Body) -> str | int:
        asked = body["messages"][0]["content"]
        if down and len(server.requests) > 8:
            return 503
        answer = next(answers[text] for text in answers if f" {text}?" in asked)
        if len(body["messages"]) == 1:
            return f"<think> I search. </think>\n<search> {answer} </search>"
        return f"<think> I know. </think>\n<answer> {answer} </answer>"

    with endpoint(say) as server:
        change_params(
            models={"teacher": server.source},
            compare=["student", "seqkd"],
            teach={"endpoint": {"attempts": 1, "concurrency": 1}},
        )
        with pytest.raises(Exception, match="all 4 episodes of a chunk failed"):
            teach()
        down.clear()
        asked = len(server.requests)
        teach()
        assert len(server.requests) == asked + 2 * 8
    link("teacher")
    assert (MODELS / "given/teacher").read_text() == f"{server.source}\n"
    raw = read_episodes(TEACHER_EPISODES)
    assert len(raw) == 12 and all(run.correct and run.well_formed for run in raw)
    filter_episodes()
    distributions()
    assert json.loads((DISTRIBUTIONS / CERTIFICATE).read_text()) == {"teacher": "endpoint"}
    distill("seqkd")
    assert (MODELS / "seqkd/model.safetensors").is_file()


def test_rows_that_an_endpoint_cannot_teach_are_refused_before_anything_runs(workplace: Path) -> None:
    (workplace / "profiles").mkdir()
    profile = yaml.safe_load((ROOT / "profiles/tiny.yaml").read_text())
    profile["models"]["teacher"] = "openai:large@http://127.0.0.1:8000/v1"
    Path("profiles/mine.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(UserError, match=r"recipes: kd, kd_long, dgpo need the teacher's distributions"):
        use("mine", [])
    use("mine", ["sft_ppo"])
    assert load_params().compare == ["student", "seqkd", "sft_ppo"]
    preflight()


def test_an_expert_without_gold_passages_says_so(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_project(workplace)
    change_params(teach={"policy": "expert"})
    for name in ("onehop", "twohop"):
        write_jsonl(questions_file(name, "train"), [Question("q", "Who?", ("Ada",))])
    (workplace / "data/index").mkdir()
    monkeypatch.setattr("tasks.stages.teach.retriever", lambda params: None)
    with pytest.raises(UserError, match="no training question has any"):
        teach()


def test_a_teacher_that_knows_nothing_is_told_the_ways_out(workplace: Path) -> None:
    make_project(workplace)
    write_episodes(TEACHER_EPISODES, [random_episode(1, correct=False)])
    with pytest.raises(UserError, match=r"nothing to train on; .*teach.policy: expert.*openai:<model>@"):
        filter_episodes()
    assert read_episodes(TEACHER_EPISODES)[0].outcome is Outcome.WRONG
