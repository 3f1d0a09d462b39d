"""`dgpo rehearse`: every stage of a profile once, in miniature, in a folder of its own.

The stages are the real programs; models have the true architecture scaled down and random weights, the data a
handful of passages and questions in the published formats. So what a long run would trip over at its third
stage (a key, a format, a vocabulary, a missing package) is seen in minutes and without a GPU.
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

from dgpo_core.agent import prompts
from dgpo_core.config.params import Params, load_params, resolve_profile
from dgpo_core.config.recipes import STUDENT, Recipes
from dgpo_core.config.yaml_text import as_text
from dgpo_core.planning.architectures import config_of
from dgpo_core.rehearsal import settings as files
from dgpo_core.rehearsal.settings import scaled_down
from tasks.commands.use import profile_path
from tasks.project.paths import CORPUS, QUESTIONS

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 1800.0  # seconds for one stage
LOGS = Path("logs")


@dataclass(frozen=True)
class Outcome:
    """How one stage went; `message` is the last line that a failed one wrote."""

    stage: str
    state: Literal["ok", "failed", "not run"]
    seconds: float = 0.0
    message: str = ""


def rehearse(profile: str | None, keep: bool, as_json: bool) -> int:
    """Run the rehearsal and print how each stage went; 1 when one failed (its folder then stays)."""
    resolved = resolve_profile(profile_path(profile)) if profile else load_params().model_dump(mode="json")
    console = Console(highlight=False, soft_wrap=True, stderr=as_json, markup=False)
    folder = Path(tempfile.mkdtemp(prefix="dgpo-rehearsal-"))
    try:
        started = time.monotonic()
        notes = prepare(folder, resolved)
        console.print(f"profile {resolved['profile']}, in {folder} ({time.monotonic() - started:.0f} s)")
        for note in notes:
            console.print(f"note: {note}")
        outcomes = run(folder, console)
    except BaseException:  # interrupted, or the profile cannot be scaled down: no log says anything
        if not keep:
            shutil.rmtree(folder)
        raise
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        console.print(f"\n{failed[0].stage} failed: {failed[0].message}\nlogs: {folder / LOGS}")
    elif not keep:
        shutil.rmtree(folder)
    if as_json:
        print(json.dumps({"notes": notes, "stages": [asdict(outcome) for outcome in outcomes]}, indent=2))
    return 1 if failed else 0


def prepare(folder: Path, resolved: dict[str, Any]) -> list[str]:
    """Write params.yaml, models and data of a rehearsal; notes on what stands in for what."""
    import torch  # takes seconds, so the command's help does not wait for it

    from dgpo_core.rehearsal import models
    from dgpo_core.rehearsal.models import build_tokenizer

    sources = resolved["models"]
    params, notes = scaled_down(resolved, torch.cuda.is_available())
    texts = [passage.contents for passage in files.passages()]
    texts += [question.question for question in files.questions("nq", "train")]
    family = config_of(sources["student"])["model_type"]
    tokenizer = build_tokenizer(family, [*texts, *lines()])
    models.save_random_student(sources["student"], tokenizer, folder / params["models"]["student"])
    episodes = [scripted(tokenizer, params, number) for number in range(4)]
    loss = models.save_taught_teacher(
        sources["teacher"], tokenizer, episodes, folder / params["models"]["teacher"]
    )
    notes.append(f"the teacher has random weights and learned one episode by heart ({loss:.3f} nats a token)")
    if params["retrieval"]["encoder"]["kind"] == "dense":
        models.save_encoder(texts, folder / "models/encoder")
    train, test = params["questions"]["train"], params["questions"]["test"]
    if params["data"]["source"] == "published":
        files.write_published(folder / "published", train, test)
    else:  # the teacher knows nothing of the embedded world
        files.write_corpus(folder / CORPUS)
        files.write_question_sets(folder / QUESTIONS, [*train, *test])
        notes.append("data: a handful of passages and questions stand in for the embedded world")
    (folder / "params.yaml").write_text(as_text(params), encoding="utf-8")
    return notes


def lines() -> tuple[str, str]:
    """What the teacher says: a search, and after the information an answer."""
    return f"<search> {files.QUERY} </search>", f"<answer> {files.ANSWER} </answer>"


def scripted(tokenizer: Any, params: dict[str, Any], number: int) -> Any:
    """An episode that the teacher is to know, with other passages for each `number`."""
    from dgpo_core.training.batches import TokenSequence

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    question = files.questions("nq", "train")[number]
    found = files.passages()[number : number + params["retrieval"]["top_k"]]
    form = params["protocol"]["documents"]
    documents = "".join(prompts.document(i, p.title, p.text, form) for i, p in enumerate(found, 1))
    room = params["protocol"]["max_information"]
    search, answer = (encode(line) for line in lines())
    ids = encode(prompts.prompt_text(question.question, params["protocol"]["instruction"], tokenizer))
    own = list(range(len(ids), len(ids) + len(search)))
    ids += search + encode(prompts.INFORMATION_PREFIX) + encode(documents)[:room]
    ids += encode(prompts.INFORMATION_SUFFIX)
    own += range(len(ids), len(ids) + len(answer))
    return TokenSequence(ids + answer, own)


def programs(params: Params) -> list[tuple[str, list[str]]]:
    """(stage as DVC names it, arguments of `python -m`), in an order in which they can run."""
    published = ["data"] if params.data.source == "published" else []
    simple = [*published, "index", "teach", "filter", "distributions"]
    made = [(name, [f"tasks.{name}"]) for name in simple]
    for name in in_order(params.recipes):
        kind = "distill" if name in params.recipes.distill else "reinforce"
        made.append((f"{kind}@{name}", [f"tasks.{kind}", name]))
    made += [(f"evaluate@{model}", ["tasks.stages.evaluate", model]) for model in params.compare]
    return [*made, ("report", ["tasks.stages.report"])]


def in_order(recipes: Recipes) -> list[str]:
    """Every recipe after the one that it starts from."""
    done: list[str] = []
    while len(done) < len(recipes.all):
        done += [n for n, row in recipes.all.items() if n not in done and row.start in (STUDENT, *done)]
    return done


def run(folder: Path, console: Console) -> list[Outcome]:
    """Run all programs in `folder`, up to the first that fails."""
    stages = programs(load_params(folder / "params.yaml"))
    (folder / LOGS).mkdir()
    outcomes: list[Outcome] = []
    for name, arguments in stages:
        if any(outcome.state == "failed" for outcome in outcomes):
            outcomes.append(Outcome(name, "not run"))
            continue
        outcomes.append(_run_one(folder, name, arguments))
        console.print(f"{outcomes[-1].state:8} {name:24} {outcomes[-1].seconds:6.1f} s")
    return outcomes


def _run_one(folder: Path, name: str, arguments: list[str]) -> Outcome:
    log, started = folder / LOGS / f"{name}.log", time.monotonic()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",  # nothing is to be fetched
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    }
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                [sys.executable, "-m", *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return Outcome(name, "failed", time.monotonic() - started, f"took more than {TIMEOUT:.0f} s")
    seconds = time.monotonic() - started
    if code == 0:
        return Outcome(name, "ok", seconds)
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return Outcome(name, "failed", seconds, text.split("\n")[-1] if text else f"exit code {code}")
