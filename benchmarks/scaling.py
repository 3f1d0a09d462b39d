"""How time and memory grow with each size: `python -m benchmarks.scaling`, within ten minutes on two cores.

A point is a process of its own with one thread: the least processor time of some repetitions, and what its
peak memory grows by. An exponent is the slope of the straight line through the logarithms (least squares),
with its 95 % interval. The updates of benchmarks/training_step.py have the plan's FLOPs and bytes beside
them. Writes its part of docs/benchmarks.md, and docs/images/scaling.svg.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from scipy import stats

from benchmarks import training_step as step
from benchmarks.alternation import fill
from benchmarks.training_step import RETURNS, peak
from dgpo_core.planning.shapes import Architecture
from dgpo_core.temporary import temporary_folder

TURNS, PROMPT, WRITTEN = 5, 32, 64  # of a rollout: the untrained student's, who never answers

PLOT = Path("docs/images/scaling.svg")
SECONDS, REPEATED = 2.0, 5  # of repetitions: until one of them is reached
SEEN = 2.0  # MiB: what memory grows by below says nothing
MODEL: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 352, "vocab_size": 2_000, "tie_word_embeddings": True,
}  # fmt: skip
Work = Callable[[], object]
Point = dict[str, float]  # size, seconds, memory (bytes); of an update flops and planned (bytes) by the plan


# --- what is measured: each function prepares, and returns what is timed


def indexing(size: int, folder: Path) -> Work:
    from benchmarks.peer_retrieval import OurBm25, make_texts_and_queries

    make_texts_and_queries(folder, size)

    def build() -> None:
        shutil.rmtree(folder / "shards", ignore_errors=True)  # of the repetition before
        OurBm25(folder).build()

    return build


def query(size: int, folder: Path) -> Work:
    from benchmarks.peer_retrieval import OurBm25, make_texts_and_queries

    make_texts_and_queries(folder, size)
    index = OurBm25(folder)
    index.build()
    return partial(index.search, range(100))


def data(size: int, folder: Path) -> Work:
    """Write a world whose passages grow with its questions."""
    return partial(_world, size)


def evaluation(size: int, folder: Path) -> Work:
    """Judge, diagnose, write and read the episodes of a model."""
    episodes, asked, decode = _episodes(size)
    return partial(_evaluate, folder, episodes, asked, decode)


def report(size: int, folder: Path) -> Work:
    """Report on three models."""
    from dgpo_core.config.params import load_params
    from dgpo_core.reporting.page import write_report

    models = ["student", "teacher", "kd"]
    episodes, asked, decode = _episodes(size)
    for model in models:
        _evaluate(folder / model, episodes, asked, decode)
    sets = dict.fromkeys(sorted({episode.dataset for episode in episodes}), "nq")
    params = load_params().model_dump()
    return partial(write_report, folder, folder, folder, folder / "report", models, sets, params)


def rollout_length(size: int, folder: Path) -> Work:
    """Write five turns of 64 tokens; `size` tokens an episode with what the environment appends."""
    return _rollout((size - 352) // 5, 32)


def rollout_batch(size: int, folder: Path) -> Work:
    return _rollout(50, size)


def update_length(size: int, folder: Path) -> Work:
    return _update(MODEL, 4, size)


def update_batch(size: int, folder: Path) -> Work:
    return _update(MODEL, size, 256)


def update_vocabulary(size: int, folder: Path) -> Work:
    return _update(MODEL | {"vocab_size": size}, 4, 256)


def update_model(size: int, folder: Path) -> Work:
    return _update(wider(size), 4, 256)


def wider(hidden: int) -> dict[str, Any]:
    return MODEL | {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4}


def _world(questions: int) -> Any:
    from dgpo_core.config.data import QuestionCounts, WorldConfig
    from dgpo_core.world.facts import generate_world
    from dgpo_core.world.questions import write_articles, write_questions

    each = questions // 9  # sets and splits: two with three, five with one
    counts = QuestionCounts(train=2 * each, dev=each // 2, test=each // 2, hard=each // 2)
    world = generate_world(WorldConfig(passages=max(400, 3 * each), questions=counts), 1)
    return write_questions(world, write_articles(world))


def _episodes(count: int) -> tuple[list[Any], dict[tuple[str, str], Any], Callable[[list[int]], str]]:
    """Return `count` episodes with a search and an answer, every other one wrong; questions; a decoder."""
    from dgpo_core.agent.episode import Ending, Episode, Outcome, Owner, Search
    from dgpo_core.datasets.records import Question
    from dgpo_core.models import load_tokenizer

    tokenizer = load_tokenizer("models/student")
    episodes, asked = [], {}
    for number in range(count):
        dataset, name = f"set{number % 7}", str(number)
        asked[dataset, name] = Question(name, f"When was Tavi Tisigi {number} born", ("1938",))
        said = "1938" if number % 2 else "1939"
        parts = [
            (asked[dataset, name].question, Owner.PROMPT),
            ("<search> Tavi Tisigi </search>", Owner.MODEL),
            ("<information> Tavi Tisigi was born in 1938. </information> " * 8, Owner.ENVIRONMENT),
            (f"<answer> {said} </answer>", Owner.MODEL),
        ]
        ids = [(token, owner) for text, owner in parts for token in tokenizer.encode(text)]
        episodes.append(
            Episode(
                question_id=name,
                dataset=dataset,
                question=asked[dataset, name].question,
                golden_answers=["1938"],
                sample=0,
                token_ids=[token for token, _ in ids],
                owners=[int(owner) for _, owner in ids],
                logprobs=[0.0] * len(ids),
                response="".join(text for text, _ in parts[1:]),
                prediction=said,
                outcome=Outcome.CORRECT if number % 2 else Outcome.WRONG,
                ending=Ending.ANSWERED,
                well_formed=True,
                hit=True,
                generations=2,
                invalid_actions=0,
                cut_turns=0,
                searches=[Search("Tavi Tisigi", ["1", "2", "3"], [3.0, 2.0, 1.0], True)],
            )
        )
    return episodes, asked, tokenizer.decode


def _evaluate(folder: Path, episodes: list[Any], asked: Any, decode: Any) -> None:
    import pyarrow.parquet as pq

    from dgpo_core.agent.episode import read_episodes, write_episodes
    from dgpo_core.evaluation import arcap, diagnosis
    from tasks.stages.evaluate import question_table

    folder.mkdir(parents=True, exist_ok=True)
    write_episodes(folder / "episodes.parquet", episodes, {"index": ""})
    read = read_episodes(folder / "episodes.parquet")
    pq.write_table(question_table(read), folder / "questions.parquet")
    pq.write_table(arcap.as_table(arcap.thinking("nq", read)), folder / "arcap.parquet")
    pq.write_table(diagnosis.diagnose(read, asked, decode), folder / "diagnosis.parquet")


def _rollout(appended: int, episodes: int) -> Work:
    from benchmarks.dgpo_step import converse
    from dgpo_core.agent.transformers_engine import TransformersEngine
    from dgpo_core.config.agent import RolloutConfig
    from dgpo_core.models import load_model, load_tokenizer

    source, rng = "models/student", random.Random(0)
    engine = TransformersEngine(
        load_model(source), load_tokenizer(source), RolloutConfig(precision="float32")
    )

    def words(count: int) -> list[int]:
        return [rng.randrange(20, 700) for _ in range(count)]

    turns = [
        [(words(appended if turn else PROMPT), WRITTEN) for turn in range(TURNS)] for _ in range(episodes)
    ]
    return partial(converse, engine, turns, 0)


def _update(config: dict[str, Any], episodes: int, length: int) -> Work:
    step.EPISODES, step.LENGTH, step.COUNTED = episodes, length, length // 4
    compute = step.compute_of("float32")
    step.load_first(compute)
    update: list[Work] = []

    def once() -> None:  # the model is a part of what memory grows by
        if not update:
            update.append(step.update_of(config, compute)[1])
        update[0]()

    return once


@dataclass(frozen=True)
class Curve:
    """A part of the pipeline over one of its sizes; `attention`: it has a part that is quadratic."""

    name: str
    over: str
    work: Callable[[int, Path], Work]
    sizes: Sequence[int]
    attention: bool = False


CURVES = (
    Curve("indexing (BM25)", "passages", indexing, (4_000, 8_000, 16_000, 32_000, 64_000)),
    Curve("100 queries (BM25)", "passages", query, (4_000, 8_000, 16_000, 32_000, 64_000)),
    Curve("data, a world", "questions", data, (2_000, 4_000, 8_000, 16_000)),
    Curve("tables of an evaluation", "questions", evaluation, (1_000, 2_000, 4_000, 8_000)),
    Curve("report on three models", "questions", report, (1_000, 2_000, 4_000, 8_000)),
    Curve("rollout", "tokens an episode", rollout_length, (402, 552, 852, 1_452), attention=True),
    Curve("rollout", "episodes", rollout_batch, (32, 64, 128, 256)),
    Curve("update", "tokens an episode", update_length, (128, 256, 512, 1_024, 2_048), attention=True),
    Curve("update", "episodes", update_batch, (2, 4, 8, 16, 32)),
    Curve("update", "vocabulary", update_vocabulary, (2_000, 8_000, 32_000, 128_000)),
    Curve("update", "parameters", update_model, (96, 192, 384, 768)),
)


# --- how it is measured


def measure(curve: Curve, size: int) -> Point:
    """Measure a point in this process."""
    torch.set_num_threads(1)
    with temporary_folder("scaling") as folder:
        work = curve.work(size, folder)
        before = peak()
        seconds: list[float] = []
        while not seconds or (len(seconds) < REPEATED and sum(seconds) < SECONDS):
            started = time.process_time()
            work()
            seconds.append(time.process_time() - started)
            memory = peak() - before
    return {"size": size, "seconds": min(seconds), "memory": memory} | planned(curve, size)


def planned(curve: Curve, size: int) -> Point:
    """Return the plan's FLOPs and bytes of an update, and its true size where that is counted in weights."""
    shapes = {
        update_length: (MODEL, 4, size),
        update_batch: (MODEL, size, 256),
        update_vocabulary: (MODEL | {"vocab_size": size}, 4, 256),
        update_model: (wider(size), 4, 256),
    }
    if curve.work not in shapes:
        return {}
    config, step.EPISODES, step.LENGTH = shapes[curve.work]
    step.COUNTED = step.LENGTH // 4
    plan = step.estimate(Architecture.from_config(config), step.compute_of("float32"))
    weights = {"size": plan["parameters"]} if curve.work is update_model else {}
    return {"flops": plan["flops"], "planned": plan["memory"]} | weights


def in_process(curve: Curve, size: int) -> Point:
    """Measure a point in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--one", str(CURVES.index(curve)), str(size)]
    environment = os.environ | RETURNS | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    point: Point = json.loads(done.stdout.splitlines()[-1])
    print(f"{curve.name}, {size:,} {curve.over}: {point}", file=sys.stderr, flush=True)
    return point


def exponent(points: list[Point], quantity: str, least: float = 0.0) -> tuple[float, float] | None:
    """Fit a power of the size, to what is above `least`; return exponent and half of its 95 % interval."""
    pairs = [(p["size"], p[quantity]) for p in points if p.get(quantity, 0.0) > least]
    if len(pairs) < 3:
        return None
    fit = stats.linregress(*np.log(pairs).T)
    return float(fit.slope), float(stats.t.ppf(0.975, len(pairs) - 2) * fit.stderr)


def table(measured: dict[Curve, list[Point]]) -> str:
    """Return a Markdown table; of updates with the plan's exponents and the ratios plan / measured."""
    lines = [
        "| what | over | sizes | time: exponent | memory: exponent | plan: FLOPs, memory "
        "| GFLOP/s | memory, plan / measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for curve, points in measured.items():
        ends = f"{points[0]['size']:,.0f} to {points[-1]['size']:,.0f}"
        cells = [_told(exponent(points, "seconds")), _told(exponent(points, "memory", SEEN * 2**20))]
        if "flops" in points[0]:
            plan = exponent(points, "flops"), exponent(points, "planned")
            cells.append(", ".join(f"{fit[0]:.2f}" for fit in plan if fit))
            cells.append(_range([p["flops"] / p["seconds"] / 1e9 for p in points], 0))
            cells.append(_range([p["planned"] / p["memory"] for p in points], 2))
        else:
            cells += [""] * 3
        over = f"{curve.over} (attention)" if curve.attention else curve.over
        lines.append(f"| {curve.name} | {over} | {ends} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(fit: tuple[float, float] | None) -> str:
    return f"{fit[0]:.2f} ± {fit[1]:.2f}" if fit else ""


def _range(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def draw(measured: dict[Curve, list[Point]]) -> None:
    """Draw time and memory over size, both relative to the smallest; the black line is linear."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, quantity in zip(axes, ("seconds", "memory"), strict=True):
        for number, (curve, points) in enumerate(measured.items()):
            shown = [p for p in points if quantity == "seconds" or p["memory"] > SEEN * 2**20]
            if len(shown) > 1:
                sizes, values = ([p[key] / shown[0][key] for p in shown] for key in ("size", quantity))
                style = "--" if curve.attention else "-"
                label = f"{curve.name} over {curve.over}"
                axis.loglog(sizes, values, style, marker="o", color=f"C{number % 10}", label=label)
        axis.axline((1, 1), (10, 10), color="black", linewidth=0.8)
        axis.set(xlabel="size, of the smallest", ylabel=f"{quantity}, of the smallest")
    axes[0].legend(fontsize=7)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=2, type=int, help="number of a curve, and a size: print the point")
    parser.add_argument("--only", help="curves with this in their names: print their table")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(CURVES[given.one[0]], given.one[1])))
        return
    chosen = [curve for curve in CURVES if (given.only or "") in f"{curve.name} over {curve.over}"]
    measured = {curve: [in_process(curve, size) for size in curve.sizes] for curve in chosen}
    print(table(measured))
    if not given.only:
        draw(measured)
        fill("scaling", table(measured) + "\n\n![Time and memory over sizes](images/scaling.svg)")


if __name__ == "__main__":
    main()
