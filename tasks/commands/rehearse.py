"""`dgpo rehearse`: every stage of a profile once, in miniature, in a folder of its own.

The stages are the real programs, in the order of dvc.yaml; dgpo_core.rehearsal makes models and data. So
what a long run would trip over at its third stage (a key, a format, a vocabulary, a missing package) is seen
in minutes and without a GPU.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from dgpo_core.config.endpoint import endpoint_of
from dgpo_core.config.params import load_params, resolve_profile
from dgpo_core.config.yaml_text import as_text
from dgpo_core.datasets.records import write_jsonl
from dgpo_core.files import write_text
from dgpo_core.planning.shapes import config_of
from tasks.commands.use import profile_path
from tasks.project.paths import CORPUS, QUESTIONS

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1800.0  # seconds for one stage
LOGS = Path("logs")


@dataclass(frozen=True)
class StageResult:
    """How one stage went; `message` is the last line that a failed one wrote."""

    stage: str
    state: Literal["ok", "failed", "not run"]
    seconds: float = 0.0
    message: str = ""


def rehearse(profile: str | None, keep: bool, as_json: bool) -> int:
    """Rehearse and print how each stage went. Return 1 when one failed, whose folder stays, else 0."""
    resolved = resolve_profile(profile_path(profile)) if profile else load_params().model_dump(mode="json")
    console = Console(highlight=False, soft_wrap=True, stderr=as_json, markup=False)
    folder = Path(tempfile.mkdtemp(prefix="dgpo-rehearsal-"))
    try:
        started = time.monotonic()
        notes = prepare(folder, resolved)
        console.print(f"profile {resolved['profile']}, in {folder} ({time.monotonic() - started:.0f} s)")
        for note in notes:
            console.print(f"note: {note}")
        results = run(folder, console)
    except BaseException:  # interrupted, or the profile cannot be scaled down: no log says anything
        if not keep:
            shutil.rmtree(folder)
        raise
    failed = [result for result in results if result.state == "failed"]
    if failed:
        console.print(f"\n{failed[0].stage} failed: {failed[0].message}\nlogs: {folder / LOGS}")
    elif not keep:
        shutil.rmtree(folder)
    if as_json:
        print(json.dumps({"notes": notes, "stages": [asdict(result) for result in results]}, indent=2))
    return 1 if failed else 0


def prepare(folder: Path, resolved: dict[str, Any]) -> list[str]:
    """Write params.yaml, dvc.yaml, models and data. Return notes on what stands in for what."""
    import torch  # it takes seconds, and the command's help does not wait for it

    from dgpo_core import rehearsal
    from dgpo_core.models import save_model

    sources = resolved["models"]
    params, notes = rehearsal.scaled_down(resolved, torch.cuda.is_available())
    if endpoint_of(sources["teacher"]):
        notes.append(f"the teacher behind {sources['teacher']}: a model of the student's shape stands in")
        sources = sources | {"teacher": sources["student"]}
    write_text(folder / "params.yaml", as_text(params))
    shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
    texts = [passage.contents for passage in rehearsal.passages()]
    texts += [question.question for question in rehearsal.questions("nq", "train")]
    family = config_of(sources["student"])["model_type"]
    tokenizer = rehearsal.build_tokenizer(family, [*texts, *rehearsal.TURNS])
    student = rehearsal.random_model(sources["student"], tokenizer, seed=1)
    save_model(student, tokenizer, folder / params["models"]["student"])
    teacher = rehearsal.random_model(sources["teacher"], tokenizer, seed=2)
    loss = rehearsal.learn_by_heart(teacher, rehearsal.episodes(tokenizer, params))
    save_model(teacher, tokenizer, folder / params["models"]["teacher"])
    notes.append(
        f"the teacher has random weights and learned four episodes by heart ({loss:.3f} nats a token)"
    )
    if params["retrieval"]["encoder"]["kind"] == "dense":
        rehearsal.save_encoder(texts, folder / "models/encoder")
    train, test = params["questions"]["train"], params["questions"]["test"]
    if params["data"]["source"] == "published":
        rehearsal.write_published(folder / "published", train, test)
    else:  # the teacher knows nothing of the embedded world, nor of what stands in your files
        write_jsonl(folder / CORPUS, rehearsal.passages())
        rehearsal.write_question_sets(folder / QUESTIONS, [*train, *test])
        notes.append("data: a handful of passages and questions stand in for yours, or the embedded world's")
    return notes


def programs(folder: Path) -> list[tuple[str, str]]:
    """Return (stage, command) of the graph in `folder` in order, without those whose outputs are there."""
    from dvc.repo import Repo
    from dvc.repo.reproduce import plan_repro

    prepared = ["base-model", "given"]
    if load_params(folder / "params.yaml").data.source != "published":
        prepared.append("data")
    with Repo(str(folder), uninitialized=True) as repo:
        stages = [(stage.name, stage.cmd) for stage in plan_repro(repo.index.graph)]
    return [(name, command) for name, command in stages if name.split("@")[0] not in prepared]


def run(folder: Path, console: Console) -> list[StageResult]:
    """Run all programs in `folder`, up to the first that fails."""
    stages = programs(folder)
    (folder / LOGS).mkdir()
    results: list[StageResult] = []
    for name, command in stages:
        if any(result.state == "failed" for result in results):
            results.append(StageResult(name, "not run"))
            continue
        results.append(_run_one(folder, name, command))
        console.print(f"{results[-1].state:8} {name:24} {results[-1].seconds:6.1f} s")
    return results


def _run_one(folder: Path, name: str, command: str) -> StageResult:
    log, started = folder / LOGS / f"{name}.log", time.monotonic()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "HF_HUB_OFFLINE": "1",  # nothing is to be fetched
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    }
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                command,
                shell=True,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return StageResult(name, "failed", time.monotonic() - started, f"took more than {TIMEOUT:.0f} s")
    seconds = time.monotonic() - started
    if code == 0:
        return StageResult(name, "ok", seconds)
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return StageResult(name, "failed", seconds, text.split("\n")[-1] if text else f"exit code {code}")
