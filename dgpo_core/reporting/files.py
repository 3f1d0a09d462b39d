"""The files of a report: complete or absent, the same bytes for the same numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def as_json(table: Any) -> str:
    return json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write each text to the file of its name in `folder`, by atomic rename."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        temporary = folder / f"{name}.part"
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(folder / name)
