"""Names and sentences of the page, derived from the numbers alone."""

from collections.abc import Mapping
from typing import Any

MODEL_LABELS = {
    "student": "Student",
    "teacher": "Teacher",
    "kd": "KD",
    "dgpo": "DGPO",
    "ppo": "PPO",
    "sft_ppo": "SFT → PPO",
    "seqkd": "SeqKD",
    "gkd": "GKD",
    "kd_gkd": "KD → GKD",
    "distillm": "DistiLLM",
    "taid": "TAID",
    "dgpo_grpo": "DGPO (GRPO)",
    "no_cold_start": "DGPO without cold start",
    "uniform_kl": "DGPO with uniform KL",
    "no_teacher": "DGPO without teacher",
    "ppo_kd": "PPO → KD",
    "grpo": "GRPO",
}
PAPER_DATASETS = {
    "nq": "NQ",
    "triviaqa": "TriviaQA",
    "popqa": "PopQA",
    "hotpotqa": "HotpotQA",
    "2wikimultihopqa": "2Wiki",
    "musique": "MuSiQue",
    "bamboogle": "Bamboogle",
}
STAGES = {"distill": "Cold start by distillation", "reinforce": "Reinforcement learning"}
GIVEN = ("student", "teacher")  # where training starts and what it looks up to: neither is trained here


def model_label(name: str) -> str:
    return MODEL_LABELS.get(name, name)


def verdict(pair: str, entry: Mapping[str, Any]) -> str:
    """What a paired difference allows to say, e.g. `DGPO beats KD by 0.052 EM`; never more than that."""
    first, second = (model_label(name) for name in pair.split("-"))
    mean, (low, high) = entry["mean"], entry["ci95"]
    if mean is None or low is None:
        return f"Too few questions to compare {first} with {second}"
    if low > 0:
        return f"{first} beats {second} by {mean:.3f} EM"
    if high < 0:
        return f"{first} is behind {second} by {-mean:.3f} EM"
    return f"No clear difference between {first} and {second}"


def evidence(entry: Mapping[str, Any]) -> str:
    """The numbers behind a verdict, in one line."""
    low, high = entry["ci95"]
    if entry["mean"] is None or low is None:
        return f"{entry['n']:,} paired questions"
    zero = "" if low > 0 or high < 0 else "; the interval includes 0"
    numbers = f"{entry['mean']:+.3f} EM (95 % interval {low:+.3f} to {high:+.3f})".replace(
        "-", "\N{MINUS SIGN}"
    )
    return f"{numbers} on {entry['n']:,} pooled questions{zero}"


def headline(comparisons: Mapping[str, Mapping[str, Any]], models: list[str]) -> tuple[str, str]:
    """Title and line of evidence: DGPO against KD where both exist, else the first pair, else the models."""
    if not comparisons:
        return " · ".join(model_label(name) for name in models), "No pair of models to compare in this run"
    pair, entry = next(iter(comparisons.items()))
    return verdict(pair, entry), evidence(entry)


def failures(results: Mapping[str, Mapping[str, Any]], average: str) -> str:
    """Who lost how many questions to failures of the infrastructure."""
    lost = {model: rows[average]["failed"] for model, rows in results.items() if rows[average]["failed"]}
    if not lost:
        return "No episode failed."
    counts = ", ".join(f"{model_label(model)} {count:,}" for model, count in lost.items())
    return f"Failed episodes (retriever or engine), left out of every average: {counts}."
