"""infra/compose.yaml as an engine would read it, with the secrets that `dgpo secrets` makes."""

import re
from pathlib import Path
from typing import Any

import yaml

from infra.secrets import write
from tests.conftest import ROOT

COMPOSE = ROOT / "infra" / "compose.yaml"
# ${NAME}, ${NAME:-default} and ${NAME:?message}: all the forms that the file may use
VARIABLE = re.compile(r"\$\{(?P<name>[A-Z_]+)(?::(?P<kind>[-?])(?P<value>[^}]*))?\}")


def secrets(folder: Path) -> dict[str, str]:
    """Return what `dgpo secrets` writes, read as an engine reads it."""
    write(folder / ".env")
    lines = (folder / ".env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def load(variables: dict[str, str] | None = None) -> dict[str, Any]:
    """Read the file with anchors and merges resolved; interpolated, if there are `variables`."""
    text = COMPOSE.read_text(encoding="utf-8")
    if variables is not None:
        text = VARIABLE.sub(lambda match: _value(match, variables), text)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def _value(match: re.Match[str], variables: dict[str, str]) -> str:
    given = variables.get(match["name"])
    if not given and match["kind"] == "?":
        raise KeyError(f"{match['name']}: {match['value']}")
    return given or (match["value"] if match["kind"] == "-" else "") or ""
