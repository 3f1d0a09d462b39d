"""Every stage on a miniature world, with the real models, index, training and report."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from dgpo_core.agent.episode import read_episodes
from dgpo_core.datasets.records import read_questions
from dgpo_core.errors import UserError
from dgpo_core.models import load_model
from tasks.commands.compare import compare
from tasks.project import paths
from tasks.project.graph import read_dag
from tasks.project.paths import questions_file
from tasks.stages.data import generate
from tasks.stages.distill import distill
from tasks.stages.distributions import distributions
from tasks.stages.evaluate import evaluate
from tasks.stages.filter import AUDIT, filter_episodes
from tasks.stages.index import index
from tasks.stages.reinforce import reinforce
from tasks.stages.report import report
from tasks.stages.teach import teach
from tasks.tracking.runs import connect
from tests.conftest import make_workplace
from tests.tasks.miniature import HEALED, ROOT, change_params, curves, make_project, run_of

pytestmark = pytest.mark.thorough

MODELS = ["student", "teacher", "kd", "dgpo"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, mlflow_store: str) -> Path:
    """A project in which every stage has run."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        make_workplace(folder, patch, mlflow_store)
        make_project(folder)
        generate()
        index()
        teach()
        filter_episodes()
        distributions()
        distill("kd")
        reinforce("dgpo")
        for model in MODELS:
            evaluate(model)
        report()
    return folder


def program(*words: str) -> list[str]:
    return [sys.executable, "-m", f"tasks.stages.{words[0]}", *words[1:]]


def kill_at(pattern: str, *words: str) -> None:
    """Kill a stage as soon as a file is there."""
    killed = subprocess.Popen(program(*words))
    while killed.poll() is None and not list(Path().glob(pattern)):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the stage ended before it could be killed"


def copy_inputs(finished: Path, folder: Path, recipes: list[str] | None = None) -> None:
    """The data and the cold start of a finished project."""
    make_project(folder, recipes)
    shutil.copytree(finished / "data", folder / "data")
    shutil.copytree(finished / paths.MODELS / "kd", folder / paths.MODELS / "kd")


def test_teacher_answers_and_only_correct_episodes_are_kept(finished: Path) -> None:
    raw = read_episodes(finished / paths.TEACHER_EPISODES)
    kept = read_episodes(finished / paths.CORRECT_EPISODES)
    assert [e for e in raw if e.correct] == kept
    assert len(kept) > len(raw) / 4, "the committed teacher must be able to search"
    head, *audit = csv.reader((finished / AUDIT).open(newline=""))
    assert head == ["data set", "reason", "episodes"]
    assert sum(int(count) for _, _, count in audit) == len(raw)


def test_a_cut_student_learns_the_corpus(finished: Path, workplace: Path) -> None:
    copy_inputs(finished, workplace)
    change_params(recipes={"distill": {"healed": HEALED}})
    distill("healed")
    rows = curves("distill-healed")
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(losses) > 1 and losses[-1] < losses[0]
    assert load_model("models/healed").config.num_hidden_layers == HEALED["layers"]


def test_results_name_every_model_and_set(finished: Path) -> None:
    results = json.loads((finished / "reports/results.json").read_text())
    sets = set(yaml.safe_load((finished / "params.yaml").read_text())["questions"]["test"])
    assert list(results) == MODELS
    for model in MODELS:
        assert set(results[model]) == sets | {"average"}
        assert all(0 <= entry["em"] <= 1 and entry["n"] > 0 for entry in results[model].values())
    assert results["teacher"]["average"]["em"] > results["student"]["average"]["em"]


def test_arcap_measures_every_dimension(finished: Path) -> None:
    arcap = json.loads((finished / "reports/arcap.json").read_text())
    assert {"source_em_nq", "source_em_musique_thinking", "query_hit_nq", "thinking_searches_musique"} <= set(
        arcap["teacher"]
    )
    of_gold = "source_em_nq_thinking"  # given the passages: to find them in so small a world is no art
    assert arcap["teacher"][of_gold]["mean"] > arcap["student"][of_gold]["mean"]


def test_every_wrong_answer_has_a_first_failure(finished: Path) -> None:
    reported = json.loads((finished / "reports/diagnosis.json").read_text())
    for model in MODELS:
        rows = pq.read_table(finished / "evaluation" / model / "diagnosis.parquet").to_pylist()
        asked = pq.read_table(finished / "evaluation" / model / "questions.parquet").to_pylist()
        same = ("dataset", "question_id", "outcome")
        assert [[row[name] for name in same] for row in rows] == [
            [row[name] for name in same] for row in asked
        ]
        assert all((row["first_failure"] is not None) == (row["outcome"] == "wrong") for row in rows)
        counts = [sum(own.values()) for own in reported[model]["by_dataset"].values()]
        assert sum(counts) == sum(row["outcome"] == "wrong" for row in rows)
        shares = [entry["mean"] for entry in reported[model]["first_failures"].values()]
        assert sum(shares) == pytest.approx(sum(counts) / len(rows), abs=1e-5), (
            "a wrong answer fails once first"
        )


def test_arcap_is_compared_in_pairs(finished: Path) -> None:
    arcap = json.loads((finished / "reports/arcap.json").read_text())
    paired = json.loads((finished / "reports/arcap_comparisons.json").read_text())
    assert list(paired) == ["dgpo-kd", "kd-student", "teacher-dgpo"]
    for name, entry in paired["kd-student"].items():
        assert entry["n"] == arcap["kd"][name]["n"]
        assert entry["mean"] == pytest.approx(
            arcap["kd"][name]["mean"] - arcap["student"][name]["mean"], abs=2e-6
        )


def test_models_load_with_plain_transformers(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in ("models/student", "models/kd", "models/dgpo"):
        model = AutoModelForCausalLM.from_pretrained(finished / folder)
        tokenizer = AutoTokenizer.from_pretrained(finished / folder)
        assert model.config.model_type == "qwen2"
        assert tokenizer.decode(tokenizer.encode(" Where was Karumi born")) == " Where was Karumi born"


def test_curves_have_a_row_a_step(finished: Path) -> None:
    rows = curves("reinforce-dgpo", finished)
    assert [(row["step"], row["episodes"]) for row in rows] == [(step, 16) for step in (1, 2, 3, 4)]
    timed = curves("processor_time/reinforce-dgpo", finished)
    assert [row["step"] for row in timed] == [1, 2, 3, 4]
    seconds = [0.0, *(row["processor_seconds"] for row in timed)]
    assert all(before < after for before, after in pairwise(seconds))


def test_what_was_trained_is_asked_training_and_validation_questions(finished: Path) -> None:
    assert not (finished / "evaluation/student/splits.parquet").exists()
    rows = pq.read_table(finished / "evaluation/kd/splits.parquet").to_pylist()
    for split in ("train", "dev"):
        for name in ("onehop", "twohop"):
            asked = [r["question_id"] for r in rows if (r["split"], r["dataset"]) == (split, name)]
            questions = read_questions(questions_file(name, split, finished / paths.QUESTIONS))
            assert asked == [question.id for question in questions[:4]]


@pytest.mark.parametrize(("stage", "count"), [("evaluate@teacher", 28), ("reinforce@dgpo", 16)])
def test_episodes_are_traced_in_the_stages_run(
    finished: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch, stage: str, count: int
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    client, run = connect(), run_of(stage, finished)
    experiment = client.get_run(run).info.experiment_id
    found = client.search_traces(locations=[experiment], run_id=run, max_results=100)
    assert len(found) == count  # 4 questions of each of 7 sets; 8 episodes of steps 2 and 4
    for trace in found:
        kinds = [span.span_type for span in trace.data.spans]
        assert kinds[:2] == ["AGENT", "LLM"]
        for span in trace.data.spans:
            if span.span_type == "RETRIEVER":
                assert span.outputs[0]["page_content"] and span.outputs[0]["metadata"]["title"]


def test_gate_is_in_mlflow_step_by_step(
    finished: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shares of every step, and the KL inside the gate."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    for name in ("gate_open", "gate_closed", "gate_excluded"):
        assert len(history(finished, "dgpo", name)) == 4
    assert history(finished, "dgpo", "kl_inside")


def test_kl_outside_the_gate_is_in_mlflow(finished: Path, workplace: Path) -> None:
    copy_inputs(finished, workplace, recipes=["no_cold_start"])
    change_params(models={"student": "models/teacher"})  # which answers: the miniature's student cannot
    reinforce("no_cold_start")
    for name in ("kl_inside", "kl_outside"):
        assert len(history(workplace, "no_cold_start", name)) == 4


def history(folder: Path, recipe: str, name: str) -> dict[int, float]:
    """MLflow's values of a metric by step, which must be those of the curve."""
    points = connect().get_metric_history(run_of(f"reinforce@{recipe}", folder), name)
    found = {point.step: point.value for point in points if point.step}  # 0 has the stage's result
    rows = curves(f"reinforce-{recipe}", folder)
    assert found == pytest.approx({int(row["step"]): row[name] for row in rows if name in row}, rel=1e-4)
    return found


def test_nothing_is_left_of_finished_stages(finished: Path) -> None:
    assert not any((finished / ".state").iterdir())
    assert not list(finished.rglob("*.part"))


def test_questions_tables_agree_with_episodes(finished: Path) -> None:
    table = pq.read_table(finished / "evaluation/kd/questions.parquet").to_pylist()
    episodes = read_episodes(finished / "evaluation/kd/episodes.parquet")
    assert [(r["question_id"], r["em"]) for r in table] == [(e.question_id, e.correct) for e in episodes]


@pytest.mark.parametrize(("module", "recipe"), [("distill", "kd"), ("reinforce", "dgpo")])
def test_killed_training_continues_to_the_same_model(
    finished: Path, workplace: Path, module: str, recipe: str
) -> None:
    copy_inputs(finished, workplace)
    if module == "distill":
        shutil.rmtree(workplace / paths.MODELS / "kd")
    kill_at(f".state/{module}@{recipe}/checkpoints/000001", module, recipe)
    assert not (workplace / paths.MODELS / recipe).exists(), "no half-written output"
    subprocess.run(program(module, recipe), check=True)
    weights = paths.MODELS / recipe / "model.safetensors"
    assert (workplace / weights).read_bytes() == (finished / weights).read_bytes()
    plot = paths.PLOTS / f"{module}-{recipe}.csv"
    assert (workplace / plot).read_text() == (finished / plot).read_text()
    times = curves(f"processor_time/{module}-{recipe}")
    assert [row["step"] for row in times] == [row["step"] for row in curves(f"{module}-{recipe}")]


def test_killed_rollouts_continue_to_the_same_episodes(finished: Path, workplace: Path) -> None:
    copy_inputs(finished, workplace)
    shutil.rmtree(workplace / "data/teacher")
    kill_at(".state/teach/episodes/*.parquet", "teach")
    subprocess.run(program("teach"), check=True)
    again, first = (read_episodes(folder / paths.TEACHER_EPISODES) for folder in (workplace, finished))
    for episode, expected in zip(again, first, strict=True):
        for search, same in zip(episode.searches, expected.searches, strict=True):
            # Qdrant's last bits differ from process to process, so a rounded score may differ by one step
            assert search.scores == pytest.approx(same.scores, abs=2e-4)
            search.scores = same.scores
    assert again == first


def test_min_em_stops_a_weak_cold_start(finished: Path, workplace: Path) -> None:
    copy_inputs(finished, workplace)
    shutil.rmtree(workplace / paths.MODELS / "kd")
    change_params(distill={"epochs": 1, "learning_rate": 1e-9, "min_em": 0.9})
    with pytest.raises(UserError, match=r"validation EM 0\.\d+ is below distill\.min_em 0\.9"):
        distill("kd")
    assert not (workplace / "models/kd").exists()
    change_params(recipes={"reinforce": {}}, compare=["kd"])  # nothing starts from it
    distill("kd")
    assert (workplace / "models/kd").exists()


@pytest.mark.parametrize("stage", ["distill", "reinforce"])
def test_a_rate_that_is_too_high_ends_the_stage_and_leaves_no_model(
    finished: Path, workplace: Path, stage: str
) -> None:
    """By distillation, and by reinforcement, where the model's own episodes are no numbers first."""
    copy_inputs(finished, workplace)
    recipe, rate = {"distill": ("kd", "learning_rate"), "reinforce": ("dgpo", "actor_learning_rate")}[stage]
    change_params(distill={"warmup_steps": 0})
    change_params(**{stage: {rate: 1e30, "max_grad_norm": 1e30}})
    shutil.rmtree(workplace / paths.MODELS / recipe, ignore_errors=True)
    said = rf"^{stage}@{recipe}: the .* of step \d is .*; lower {stage}\.{rate} \(now 1e\+30\)"
    with pytest.raises(UserError, match=said):
        {"distill": distill, "reinforce": reinforce}[stage](recipe)
    assert not (workplace / paths.MODELS / recipe).exists()
    versions = connect().search_model_versions(f"tags.recipe = '{recipe}'")
    assert all(version.run_id != run_of(f"{stage}@{recipe}") for version in versions)


@pytest.mark.parametrize(
    "recipe", ["seqkd", "taid", "distillm", "kd_gkd", "kd_gkd_k1", "guided", "kd_evidence"]
)
def test_distillations_of_the_papers_table(finished: Path, workplace: Path, recipe: str) -> None:
    copy_inputs(finished, workplace, recipes=[recipe])
    distill(recipe)
    weights = (workplace / paths.MODELS / recipe / "model.safetensors").read_bytes()
    assert weights != (workplace / "models/student/model.safetensors").read_bytes()
    rows = curves(f"distill-{recipe}")
    assert all(row["loss"] > 0 for row in rows) or recipe == "kd_gkd_k1"  # an estimate has both signs
    assert "dev_em" in rows[-1]
    assert ("divergence" in rows[0]) == (recipe != "seqkd")
    assert ("taid_t" in rows[0]) == (recipe == "taid")
    assert ("validation_loss" in rows[-1]) == (recipe == "distillm")
    for column in ("em", "searches", "invalid_actions", "response_tokens", "entropy"):
        assert (column in rows[0]) == (recipe in ("kd_gkd", "kd_gkd_k1", "guided"))


def test_live_teacher_gives_the_same_losses_as_the_kept_one(finished: Path, workplace: Path) -> None:
    copy_inputs(finished, workplace)
    certificate = json.loads((workplace / "data/distributions/certificate.json").read_text())
    change_params(distill={"teacher": "live"})
    shutil.rmtree(workplace / "models/kd")
    shutil.rmtree(workplace / "data/distributions")
    distributions()
    distill("kd")
    cached, live = (curves("distill-kd", folder) for folder in (finished, workplace))
    error = live[0]["divergence"] - cached[0]["divergence"]
    assert 0 <= error <= max(certificate["kl_error_max"], 1e-4)
    assert live[-1]["loss"] == pytest.approx(cached[-1]["loss"], rel=0.05)


@pytest.mark.parametrize("recipe", ["dgpo_loss", "teachable_loss", "grpo_loss"])
def test_kl_as_a_term_of_the_loss(finished: Path, workplace: Path, recipe: str) -> None:
    """Of a training that ends at the first validation without a rise, and keeps the best model."""
    copy_inputs(finished, workplace, recipes=[recipe])
    change_params(reinforce={"patience": 1, "dev_every": 1})
    reinforce(recipe)
    rows = curves(f"reinforce-{recipe}")
    assert all(row["guidance_loss"] >= 0 and row["reward"] == row["em"] for row in rows)
    assert any(row["guidance_loss"] > 0 and row["kl_inside"] > 0 for row in rows)
    ems = [row["dev_em"] for row in rows]
    metrics = json.loads((workplace / paths.METRICS / f"reinforce-{recipe}.json").read_text())
    assert metrics["dev_em"] == pytest.approx(max(ems), abs=1e-6)
    assert metrics["kept_step"] == ems.index(max(ems)) + 1
    assert len(rows) == 4 or ems[-1] <= max(ems[:-1])


@pytest.mark.parametrize("recipe", ["reinforce_loss", "sod_loss", "dgpo_repeat", "grpo_preserve"])
def test_reinforcement_beyond_the_paper(finished: Path, workplace: Path, recipe: str) -> None:
    copy_inputs(finished, workplace, recipes=[recipe])
    reinforce(recipe)
    rows = curves(f"reinforce-{recipe}")
    assert len(rows) == 4 and any(row["actor_grad_norm"] > 0 for row in rows)
    assert ("value_loss" in rows[0]) == (recipe in ("sod_loss", "dgpo_repeat"))
    assert ("guidance_loss" in rows[0]) == recipe.endswith("_loss")
    assert ("preserve_loss" in rows[0]) == (recipe == "grpo_preserve")


def test_grpo_stage(finished: Path, workplace: Path) -> None:
    copy_inputs(finished, workplace, recipes=["dgpo_grpo"])
    reinforce("dgpo_grpo")
    rows = curves("reinforce-dgpo_grpo")
    assert len(rows) == 4 and "value_loss" not in rows[0]
    shares = [row[f"gate_{part}"] for row in rows for part in ("open", "closed", "excluded")]
    assert sum(shares) == pytest.approx(4, abs=1e-4)


def test_a_new_recipe_is_lines_in_params_yaml(
    finished: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that the paper does not have: trained, evaluated, reported, compared, and in DVC's graph."""
    copy_inputs(finished, workplace)
    row = {"start": "kd", "algorithm": "grpo", "guidance": "uniform", "reference": "initial"}
    change_params(recipes={"reinforce": {"mine": row}}, compare=["kd", "mine"])
    shutil.copytree(finished / "evaluation/kd", workplace / "evaluation/kd")
    reinforce("mine")
    evaluate("mine")
    report()
    results = json.loads((workplace / "reports/results.json").read_text())
    assert list(results) == ["kd", "mine"]
    capsys.readouterr()
    compare("mine", "kd", as_json=True)
    average = json.loads(capsys.readouterr().out)["em"]["average"]
    assert average["first"] == pytest.approx(results["mine"]["average"]["em"], abs=1e-5)
    assert average["difference"] == pytest.approx(average["first"] - average["second"], abs=2e-6)

    shutil.copy(ROOT / "dvc.yaml", workplace)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["dvc", "init", "-q"], check=True)
    stages = read_dag(workplace)
    assert "distill@kd" in stages["reinforce@mine"].upstream
    assert stages["evaluate@mine"].upstream[-1] == "reinforce@mine"
    assert {"evaluate@kd", "evaluate@mine", "reinforce@mine"} <= set(stages["report"].upstream)


def test_malformed_lines_are_named(finished: Path, workplace: Path) -> None:
    copy_inputs(finished, workplace)
    shutil.rmtree(workplace / "data/index")
    with (workplace / "data/corpus.jsonl").open("a") as corpus:
        corpus.write('{"id": "x", "contents": 5}\n')
    lines = len((workplace / "data/corpus.jsonl").read_text().splitlines())
    with pytest.raises(UserError, match=rf"data/corpus\.jsonl:{lines}: .*contents"):
        index()
    assert not (workplace / "data/index").exists()


def test_model_without_tokenizer_is_refused(finished: Path, workplace: Path) -> None:
    copy_inputs(finished, workplace)
    teacher = workplace / "models/bare"
    shutil.copytree((workplace / "models/teacher").resolve(), teacher)
    for file in teacher.glob("tokenizer*"):
        file.unlink()
    change_params(models={"teacher": "models/bare"})
    with pytest.raises(UserError, match=r"models/bare: this model folder has no tokenizer"):
        evaluate("teacher")
    assert not (workplace / "evaluation").exists()
