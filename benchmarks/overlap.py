"""What `reinforce.overlap` gains on this machine, and costs in EM: `python -m benchmarks.overlap`.

It needs what `make demo` has made. Trainings from `models/kd`, each a process of its own, take turns step by
step, so that a ratio is that of two steps one after the other. The first step, which samples twice under
overlap, and the last, which samples nothing ahead, are not counted; the validation at the end is not timed.
Writes its table into docs/benchmarks.md.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.alternation import Rounds, fill, table
from dgpo_core.agent.prompts import known_ids
from dgpo_core.config.params import Params, load_params
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.reinforce import Reinforcer
from tasks.stages.inputs import retriever
from tasks.stages.rollouts import DevEvaluator, load_student, split_tasks, training_loop, training_rollout

MODEL, RECIPE = "models/kd", "dgpo"
THREADS = os.cpu_count() or 1
CONTENDERS = {  # name -> threads of each part, whether they overlap
    f"one after the other, {THREADS} threads": (THREADS, False),
    f"overlap, {THREADS} threads each": (THREADS, True),
    f"overlap, {max(1, THREADS // 2)} thread each": (max(1, THREADS // 2), True),
}


def settings(steps: int, overlap: bool) -> Params:
    """Return this project's settings for a few steps, alike but for `overlap`."""
    content = load_params().model_dump()
    content["reinforce"] |= {"steps": steps, "overlap": overlap, "importance_cap": 2.0, "dev_every": steps}
    content["reinforce"] |= {"old_logprobs": "trainer", "checkpoint_every": steps + 1, "dev_questions": 200}
    return Params.model_validate(content)


def train(steps: int, overlap: bool) -> None:
    """Train; before each step wait for a line, after it print its seconds and metrics as JSON."""
    params = settings(steps, overlap)
    tokenizer, student = load_tokenizer(MODEL), load_student(params, MODEL)
    sampler = copy.deepcopy(student) if overlap else student
    loop = training_loop(params, sampler, MODEL, tokenizer, retriever(params))
    tasks = split_tasks(params, "train", params.seed)
    rollout = training_rollout(loop, tasks, params.reinforce.sampling, params.seed)
    dev = DevEvaluator(params, loop, params.reinforce.dev_questions)
    teacher, recipe, known = (
        load_model(params.models.teacher),
        params.reinforcement(RECIPE),
        known_ids(tokenizer),
    )
    trainer = Reinforcer(
        student, teacher, recipe, params.reinforce, params.compute, params.seed, known, sampler
    )
    began = apart = 0.0

    def wait() -> None:
        nonlocal began, apart
        sys.stdin.readline()
        began, apart = time.perf_counter(), 0.0

    def evaluate() -> float:
        nonlocal apart
        started = time.perf_counter()
        em = dev()
        apart = time.perf_counter() - started
        return em

    def report(_: int, rows: list[dict[str, float]]) -> None:
        print(json.dumps(rows[-1] | {"seconds": time.perf_counter() - began - apart}), flush=True)
        wait()

    wait()
    with tempfile.TemporaryDirectory() as folder:
        trainer.train(len(tasks), rollout, Checkpoint(Path(folder)), evaluate, report)


@contextmanager
def contender(steps: int, threads: int, overlap: bool) -> Iterator["subprocess.Popen[str]"]:
    """Start a training that waits for its turns."""
    words = ["--one", "overlap" if overlap else "plain", "--steps", str(steps)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.overlap", *words],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def step(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Let a training do one step, and return its metrics."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    row: dict[str, Any] = json.loads(process.stdout.readline())
    return row


def compare(steps: int) -> tuple[Rounds, dict[str, float]]:
    """Return the seconds of the steps that count, and each contender's validation EM after the last."""
    with ExitStack() as stack:
        processes = {name: stack.enter_context(contender(steps, *how)) for name, how in CONTENDERS.items()}
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
        for number in range(steps):
            for name, process in processes.items():
                rows[name].append(step(process))
            print(f"step {number + 1} of {steps}", file=sys.stderr, flush=True)
    seconds = {name: [row["seconds"] for row in own[1:-1]] for name, own in rows.items()}
    return Rounds("a step of DGPO", seconds, unit="step"), {n: own[-1]["dev_em"] for n, own in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--one", choices=("plain", "overlap"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        train(given.steps, given.one == "overlap")
        return
    rounds, em = compare(given.steps)
    found = "; ".join(f"{name}: {value:.3f}" for name, value in em.items())
    text = f"{table([rounds])}\n\nEM of 200 validation questions after {given.steps} steps: {found}."
    print(text)
    fill("overlap", text)


if __name__ == "__main__":
    main()
