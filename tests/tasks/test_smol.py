"""The profile `smol` with its real packages: the conversion, and every stage once, on a few questions each.

Takes some minutes and the network, once: what was downloaded stays in data/smol/wheels of the checkout.
"""

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from dgpo_core.agent.episode import Outcome, read_episodes, read_metadata, write_episodes
from dgpo_core.config.params import overlay, resolve_profile
from dgpo_core.datasets.records import read_corpus, read_questions, write_jsonl
from dgpo_core.models import load_model, load_tokenizer
from tasks.commands.fetch import CORPUS, MODEL, QUESTIONS, WHEELS, fetch_smol
from tasks.project.paths import CORRECT_EPISODES, EVALUATION, TEACHER_EPISODES
from tasks.stages.audit import audit
from tasks.stages.data import generate
from tasks.stages.distill import distill
from tasks.stages.distributions import distributions
from tasks.stages.evaluate import evaluate
from tasks.stages.filter import filter_episodes
from tasks.stages.index import index
from tasks.stages.reinforce import reinforce
from tasks.stages.report import report
from tasks.stages.teach import teach
from tests.conftest import ROOT, make_workplace
from tests.tasks.miniature import curves

pytestmark = pytest.mark.slow

# what docs/smol.md says of the whole
COUNTS = {
    "nq": {"train": 336, "test": 221},
    "triviaqa": {"train": 979, "test": 1277},
    "webquestions": {"test": 256},
    "comparison": {"train": 400, "test": 150},
    "twohop": {"train": 219, "test": 110},
}
KEPT = {"train": 2, "test": 1}  # questions of each set; one of two becomes a validation question
TRAINED = ["nq", "twohop"]
ONE_STEP = {"epochs": 1, "batch_size": 64, "warmup_steps": 0, "dev_questions": 1}
FEW: dict[str, Any] = {
    "questions": {"train": TRAINED},
    "protocol": {"max_turns": 2, "max_new_tokens": 32},
    "retrieval": {"top_k": 1},
    "distributions": {"sample": 2},
    "evaluate": {"questions": 1, "counterfactual_questions": 0, "split_questions": 1, "trace_episodes": 0},
    "reinforce": {
        "steps": 1,
        "batch_size": 4,
        "mini_batch_size": 4,
        "dev_every": 1,
        "dev_questions": 1,
        "actor_learning_rate_warmup": 0.0,
    },
}
HEALING = {**ONE_STEP, "corpus": {"tokens": 64, "sequences": 8, "validation": 1, "dev_every": 1}}


def use(profile: str, rows: list[str] | None = None, **sections: Any) -> None:
    """Write params.yaml from a profile, made small."""
    params = resolve_profile(ROOT / f"profiles/{profile}.yaml", rows)
    Path("params.yaml").write_text(yaml.safe_dump(overlay(params, FEW | sections), sort_keys=False))


def counts() -> dict[str, dict[str, int]]:
    return {
        folder.name: {path.stem: len(read_questions(path)) for path in folder.iterdir()}
        for folder in QUESTIONS.iterdir()
    }


def keep_a_few() -> None:
    """Leave the first questions of each set, and their gold passages as the corpus."""
    gold: set[str] = set()
    for path in sorted(QUESTIONS.glob("*/*.jsonl")):
        questions = read_questions(path)[: KEPT[path.stem]]
        gold |= {passage["id"] for q in questions for passage in q.metadata["golden_passages"]}
        write_jsonl(path, questions)
    write_jsonl(CORPUS, [passage for passage in read_corpus(CORPUS) if passage.id in gold])


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory, mlflow_store: str) -> Path:
    """A project with what `dgpo fetch smol` writes."""
    folder = tmp_path_factory.mktemp("smol")
    (ROOT / WHEELS).mkdir(parents=True, exist_ok=True)
    (folder / WHEELS).parent.mkdir(parents=True)
    (folder / WHEELS).symlink_to(ROOT / WHEELS)
    with pytest.MonkeyPatch.context() as patch:
        make_workplace(folder, patch, mlflow_store)
        fetch_smol(None)
        assert counts() == COUNTS
    return folder


@pytest.fixture(scope="module")
def finished(fetched: Path, mlflow_store: str) -> Path:
    """The same project, after one step of every stage of smol-models and of smol."""
    with pytest.MonkeyPatch.context() as patch:
        make_workplace(fetched, patch, mlflow_store)
        keep_a_few()
        make_models()
        make_results()
    return fetched


def make_models() -> None:
    """Run the stages of smol-models."""
    small = {"smol_student": {"settings": HEALING}, "smol_teacher": {"settings": ONE_STEP}}
    use("smol-models", recipes={"distill": small})
    generate()
    index()
    audit()
    teach()
    filter_episodes()
    distributions()  # none, as the teacher of both trainings is live
    distill("smol_student")
    distill("smol_teacher")


def make_results() -> None:
    """Run the stages of smol. A teacher of one step answers nothing: the expert's episodes join its own."""
    experts = read_episodes(TEACHER_EPISODES)
    use(
        "smol",
        ["kd", "dgpo"],
        protocol={"max_turns": 1, "max_new_tokens": 24},
        distill=ONE_STEP,
        compare=["dgpo"],
    )
    teach()
    both = [*experts, *read_episodes(TEACHER_EPISODES)]
    write_episodes(TEACHER_EPISODES, both, read_metadata(TEACHER_EPISODES))
    filter_episodes()
    distributions()
    distill("kd")
    reinforce("dgpo")
    evaluate("dgpo")
    report()


def test_the_converted_model_is_smollm2(fetched: Path) -> None:
    """Its size is the one that its authors publish, and it knows what it knew."""
    model, tokenizer = load_model(str(fetched / MODEL), "cpu"), load_tokenizer(str(fetched / MODEL))
    assert sum(weights.numel() for weights in model.parameters()) == 134_515_008
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    ids = prompt["input_ids"]
    with torch.no_grad():
        said = model.generate(ids, do_sample=False, max_new_tokens=10)  # type: ignore[operator]
    assert "Paris" in tokenizer.decode(said[0, ids.shape[1] :])


def test_expert_and_teacher_write_episodes(finished: Path) -> None:
    """The expert answers from the real passages, and nobody's retriever fails."""
    episodes = read_episodes(finished / TEACHER_EPISODES)
    assert [episode.dataset for episode in episodes] == [*TRAINED, *TRAINED]
    assert all(episode.outcome is not Outcome.FAILED for episode in episodes)
    kept = read_episodes(finished / CORRECT_EPISODES)
    assert kept == [episode for episode in episodes if episode.correct]
    assert kept[: len(TRAINED)] == episodes[: len(TRAINED)]


def test_the_teacher_is_the_whole_model_after_a_step(finished: Path) -> None:
    whole, taught = (load_model(str(finished / path), "cpu") for path in (MODEL, "models/smol_teacher"))
    assert taught.config.num_hidden_layers == whole.config.num_hidden_layers == 30
    assert changed(whole, taught)
    (row,) = curves("distill-smol_teacher", finished)
    assert 0 < row["loss"] < math.log(49_152), "it knows English"


def test_a_step_heals_the_cut_student(finished: Path) -> None:
    (row,) = curves("distill-smol_student", finished)
    assert row["validation_loss"] < row["loss"]
    assert load_model(str(finished / "models/smol_student"), "cpu").config.num_hidden_layers == 10


def test_the_student_goes_through_every_stage(finished: Path) -> None:
    names = ("models/smol_student", "models/kd", "models/dgpo")
    student, kd, dgpo = (load_model(str(finished / name), "cpu") for name in names)
    assert changed(student, kd) and changed(kd, dgpo)
    asked = pq.read_table(finished / EVALUATION / "dgpo/questions.parquet").to_pylist()
    assert sorted(row["dataset"] for row in asked) == sorted(COUNTS)
    episodes = read_episodes(finished / EVALUATION / "dgpo/episodes.parquet")
    assert all(episode.outcome is not Outcome.FAILED for episode in episodes)
    assert (finished / "reports/index.html").is_file()


def changed(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Tell whether two models of one shape have other weights."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)
