"""How reports say and write things: names, sentences and cells from numbers, and files from texts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from dgpo_core.files import write_text

TEMPLATES = Path(__file__).parent / "templates"

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
    "kd_long": "KD, longer",
    "best": "DGPO, KL of last turns",
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
    """Return a model's name for people."""
    return MODEL_LABELS.get(name, name)


def comparison(pair: str, entry: Mapping[str, Any]) -> str:
    """Say what a paired difference allows, e.g. `DGPO beats KD by 0.052 EM`, and never more than that."""
    first, second = (model_label(name) for name in pair.split("-"))
    mean, (low, high) = entry["mean"], entry["ci95"]
    if mean is None or low is None:
        return f"Too few questions to compare {first} with {second}"
    if low > 0:
        return f"{first} beats {second} by {mean:.3f} EM"
    if high < 0:
        return f"{first} is behind {second} by {-mean:.3f} EM"
    return f"No clear difference between {first} and {second}"


def comparison_numbers(entry: Mapping[str, Any]) -> str:
    """Write the numbers behind `comparison` in one line."""
    low, high = entry["ci95"]
    if entry["mean"] is None or low is None:
        return f"{entry['n']:,} paired questions"
    zero = "" if low > 0 or high < 0 else "; the interval includes 0"
    numbers = f"{signed(entry['mean'])} EM (95 % interval {signed(low)} to {signed(high)})"
    return f"{numbers} on {entry['n']:,} questions{zero}"


def headline(comparisons: Mapping[str, Mapping[str, Any]], models: list[str]) -> tuple[str, str]:
    """Return title and numbers: of DGPO against KD where both exist, else the first pair, else the models."""
    if not comparisons:
        return " · ".join(model_label(name) for name in models), "No pair of models to compare in this run"
    pair, entry = next(iter(comparisons.items()))
    return comparison(pair, entry), comparison_numbers(entry)


def failures(results: Mapping[str, Mapping[str, Any]], average: str) -> str:
    """Say which model lost how many questions to failures of the infrastructure."""
    lost = {model: rows[average]["failed"] for model, rows in results.items() if rows[average]["failed"]}
    if not lost:
        return "No episode failed."
    counts = ", ".join(f"{model_label(model)} {count:,}" for model, count in lost.items())
    return f"Failed episodes (retriever or engine), left out of every average: {counts}."


def part_played(mirrored: str | None) -> str:
    """Say which of the paper's data sets one plays, for the head of its column; nothing where none."""
    return f"as {PAPER_DATASETS.get(mirrored, mirrored)}" if mirrored else ""


def own_scale(mirrors: Mapping[str, str | None]) -> bool:
    """Tell whether a data set stands beside figures of the paper that were measured on another one."""
    return any(mirrored and name != mirrored for name, mirrored in mirrors.items())


def as_json(table: Any) -> str:
    """Write a table as indented JSON; nan is refused with ValueError."""
    return json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write each text to the file of its name in `folder`, by atomic rename."""
    for name, text in texts.items():
        write_text(folder / name, text)


def template(name: str) -> Template:
    """Return a template of a page, which escapes what it is given and fails for what it is not."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name)


def asset(name: str) -> Markup:
    """Return a style sheet or a script of ours, which a page includes as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


COLOURS = {name: index for index, name in enumerate(MODEL_LABELS)}  # of the style sheet
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
Row = dict[str, Any]


def colour_of(name: str, models: Iterable[str]) -> int:
    """Return a model's colour; a recipe of the user's takes one of the paper's, which is seldom beside it."""
    if name in COLOURS:
        return COLOURS[name]
    others = [model for model in models if model not in COLOURS]
    return 4 + others.index(name) % (len(COLOURS) - 4)


def model_head(name: str, models: Sequence[str]) -> Row:
    """Return the head of a model's row: name, label, colour and note."""
    return {
        "name": name,
        "label": model_label(name),
        "colour": colour_of(name, models),
        "note": {"student": "before training", "teacher": "the model to learn from"}.get(name, "trained"),
    }


def cell(
    mean: float | None, ci95: Sequence[float | None] | None, reference: float | None, places: int
) -> Row:
    """Return a table's cell as texts; `reference` is the paper's figure, `note` appears on pointing at it."""
    low, high = ci95 or (None, None)
    return {
        "value": DASH if mean is None else f"{mean:.{places}f}",
        "interval": "" if low is None or high is None else f"{low:.{places}f} {DASH} {high:.{places}f}",
        "paper": "" if reference is None else f"{reference:.{places}f}",
        "best": False,
        "note": "",
    }


def signed_cell(entry: Mapping[str, Any], places: int) -> Row:
    """Return a paired difference's cell with signs; `best` marks an interval without 0."""
    mean, (low, high) = entry["mean"], entry["ci95"]
    known = low is not None and high is not None
    return {
        "value": signed(mean, places),
        "interval": f"{signed(low, places)} to {signed(high, places)}" if known else "",
        "paper": "",
        "best": known and (low > 0 or high < 0),
        "note": f"{entry['n']:,} paired questions",
    }


def signed(value: float | None, places: int = 3) -> str:
    """Write a difference with its sign; 0 has none."""
    if value is None:
        return DASH
    rounded = round(value, places) + 0.0  # + 0.0: no "-0.0"
    return f"{rounded:{'+' if rounded else ''}.{places}f}".replace("-", MINUS)


def digits(quantity: str) -> int:
    """Return the decimal places of a quantity: fewer for counts than for shares."""
    return 1 if quantity == "model_tokens" else 2 if "searches" in quantity else 3
