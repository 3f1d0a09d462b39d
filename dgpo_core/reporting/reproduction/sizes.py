"""Several pairs of models side by side (the paper's figure 3 and table 3): EM by size and family."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dgpo_core.errors import UserError
from dgpo_core.reporting.files import write_texts
from dgpo_core.reporting.results import AVERAGE
from dgpo_core.reporting.words import GIVEN, model_label

COMPARED = (*GIVEN, "ppo", "kd", "dgpo")
SIZES, TABLES = "sizes.md", "tables.json"


def parameter_counts(root: Path) -> dict[str, int]:
    """Parameters of the given models whose folders a run has (`models/<name>/*.safetensors`)."""
    counts = {}
    for name in GIVEN:
        files = sorted((root / "models" / name).glob("*.safetensors"))
        if files:
            counts[name] = sum(_parameters(file) for file in files)
    return counts


def _parameters(file: Path) -> int:
    try:
        with safe_open(file, framework="numpy") as tensors:
            names: list[str] = tensors.keys()
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file: {error}") from error


def write_sizes(folder: Path) -> None:
    """Write `sizes.md` from every `<profile>/tables.json` in `folder`, smallest student first."""
    found = {path.parent.name: _read(path) for path in sorted(folder.glob(f"*/{TABLES}"))}
    write_texts(folder, {SIZES: markdown(found)})


def markdown(profiles: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a pair of models: sizes, seeds, average EM with its interval, and the paper's pair."""
    rows = sorted(profiles.items(), key=lambda item: item[1].get("parameters", {}).get("student", 0))
    head = ["profile", "student", "teacher", "seeds", *(model_label(model) for model in COMPARED), "paper"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, tables in rows:
        sizes = tables.get("parameters", {})
        cells = [name, *(_size(sizes.get(model)) for model in GIVEN)]
        cells.append(", ".join(map(str, tables["seeds"])))
        cells += [_cell(tables["exact_match"].get(model)) for model in COMPARED]
        cells.append(tables["pair"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _size(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e6:,.2f} M"


def _cell(own: Mapping[str, Any] | None) -> str:
    if own is None or own[AVERAGE]["mean"] is None:
        return "not run"
    entry = own[AVERAGE]
    low, high = entry["ci95"]
    published = "" if entry["paper"] is None else f"; paper {entry['paper']:.3f}"
    return f"**{entry['mean']:.3f}** [{low:.3f}, {high:.3f}]{published}"


def _read(path: Path) -> dict[str, Any]:
    try:
        tables: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"seeds", "pair", "exact_match"} <= tables.keys():
            raise ValueError("these are not the tables of a reproduction")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return tables
