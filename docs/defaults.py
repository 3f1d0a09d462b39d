"""Print every setting with default, mark of table 8 and value in `tiny`: `python docs/defaults.py`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dgpo_core.config.params import Params, resolve_profile

ROOT = Path(__file__).parents[1]
PROFILE = ROOT / "profiles/tiny.yaml"
LEFT_OUT = ("profile", "world", "base_models", "recipes")
TABLE_8 = (
    "reinforce.steps reinforce.batch_size reinforce.beta reinforce.actor_learning_rate "
    "reinforce.critic_learning_rate protocol.max_context protocol.max_new_tokens protocol.max_turns "
    "retrieval.top_k distill.epochs distill.batch_size distill.learning_rate distill.kl_weight"
).split()


def leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, default, description) of every setting."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.description or ""


def value_at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(k if k == v else f"{k}: {v}" for k, v in value.items())
    return ", ".join(value) if isinstance(value, list) else json.dumps(value).strip('"')


def table() -> str:
    resolved = resolve_profile(PROFILE)
    lines = [f"| key | default | table 8 | {PROFILE.stem} | meaning |", "|---|---|---|---|---|"]
    for key, default, meaning in leaves(Params(profile="defaults")):
        if key.split(".")[0] not in LEFT_OUT:
            own = value_at(resolved, key)
            other = "" if own == default else shown(own)
            mark = "✓" if key in TABLE_8 else ""
            lines.append(f"| `{key}` | {shown(default)} | {mark} | {other} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
