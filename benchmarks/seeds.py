"""The pipeline with several seeds of its training stages: `python -m benchmarks.seeds 0 1 2`.

Each seed runs in a git worktree of its own (`.runs/seed-<n>`, kept, so that a killed run continues) with the
project's DVC cache, so data, index and teacher episodes are made once. Writes `benchmarks/results/seeds.json`
and prints the tables of docs/results.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml

from dgpo_core.scoring.statistics import mean_with_interval, paired_difference

RUNS, RESULTS = Path(".runs"), Path("benchmarks/results/seeds.json")
MODELS = ("student", "teacher", "kd", "dgpo")
PAIRS = (("dgpo", "kd"), ("kd", "student"))


def run_seed(seed: int) -> Path:
    """Run the pipeline with `seed` at the current commit; returns its worktree."""
    tree = (RUNS / f"seed-{seed}").resolve()
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), "HEAD"], check=True)
    else:
        head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        subprocess.run(["git", "checkout", "--force", "--detach", head.stdout.strip()], cwd=tree, check=True)
    cache = subprocess.run(["dvc", "cache", "dir"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["dvc", "cache", "dir", "--local", str(Path(cache).resolve())], cwd=tree, check=True)
    params = yaml.safe_load((tree / "params.yaml").read_text())
    params["seed"] = seed
    (tree / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    environment.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{Path('mlflow.db').resolve()}")
    subprocess.run([sys.executable, "-m", "tasks.pipeline"], cwd=tree, env=environment, check=True)
    return tree


def questions_of(tree: Path, model: str) -> dict[tuple[str, str], float]:
    """EM of each test question that did not fail."""
    table = pq.read_table(tree / "evaluation" / model / "questions.parquet").to_pylist()
    return {(r["dataset"], r["question_id"]): float(r["em"]) for r in table if r["outcome"] != "failed"}


def summarize(trees: dict[int, Path]) -> dict[str, object]:
    """Averages over the seven sets, EM of each set, and paired differences, for every seed and pooled."""
    seeds: dict[str, dict[str, object]] = {}
    # the same questions are asked in every run: differences are averaged over seeds, question by question
    pooled: dict[str, dict[tuple[str, str], list[float]]] = {f"{a}-{b}": {} for a, b in PAIRS}
    for seed, tree in trees.items():
        scores = {model: questions_of(tree, model) for model in MODELS}
        sets = sorted({name for name, _ in scores["student"]})
        row: dict[str, object] = {
            model: {
                name: float(np.mean([em for (dataset, _), em in values.items() if dataset == name]))
                for name in sets
            }
            for model, values in scores.items()
        }
        for first, second in PAIRS:
            shared = sorted(scores[first].keys() & scores[second].keys())
            a, b = ([scores[model][key] for key in shared] for model in (first, second))
            for key, x, y in zip(shared, a, b, strict=True):
                pooled[f"{first}-{second}"].setdefault(key, []).append(x - y)
            row[f"{first}-{second}"] = vars(paired_difference(a, b))
        seeds[str(seed)] = row
    overall = {
        pair: vars(mean_with_interval([np.mean(differences) for differences in questions.values()]))
        for pair, questions in pooled.items()
    }
    return {"seeds": seeds, "pooled": overall}


def tables(summary: dict[str, object]) -> str:
    """Markdown: average EM and the paired differences of every seed, and the pooled differences."""
    lines = ["| seed | student | teacher | kd | dgpo | dgpo - kd (95 %) |", "|---|---|---|---|---|---|"]
    seeds: dict[str, dict[str, dict[str, float]]] = summary["seeds"]  # type: ignore[assignment]
    for seed, row in seeds.items():
        averages = " | ".join(f"{np.mean(list(row[model].values())):.3f}" for model in MODELS)
        lines.append(f"| {seed} | {averages} | {_interval(row['dgpo-kd'])} |")
    pooled: dict[str, dict[str, float]] = summary["pooled"]  # type: ignore[assignment]
    lines += [
        f"\nPooled {pair}: {_interval(estimate)} ({estimate['n']} questions)"
        for pair, estimate in pooled.items()
    ]
    return "\n".join(lines)


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"


def main(arguments: list[str]) -> None:
    seeds = [int(argument) for argument in arguments] or [0, 1, 2]
    summary = summarize({seed: run_seed(seed) for seed in seeds})
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=2) + "\n")
    print(tables(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
