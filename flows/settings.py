"""What a pipeline run can be asked for: the form on the dashboard."""

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from dgpo_core.config.params import PARAMS, read_yaml, resolve_profile
from dgpo_core.config.yaml_text import parse
from dgpo_core.errors import UserError
from tasks.commands.use import PROFILES

KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
EACH = re.compile(r"\$\{(?P<key>[\w.]+)\}")  # what a stage of dvc.yaml is repeated for
GROUPS = ("all", "variants")  # names for many rows of recipes at once
# fields of the form -> keys of params.yaml
USUAL = {
    "beta": "reinforce.beta",
    "steps": "reinforce.steps",
    "learning_rate": "reinforce.actor_learning_rate",
    "questions": "evaluate.questions",
}
# fields of the form -> what they let people choose from
CHOICES = {"profile": "profiles", "recipes": "recipes", "targets": "stages", "from_stage": "stages"}


def _may_be_empty(schema: dict[str, Any]) -> None:
    """Show a value that may be left out as one field: the form would ask for its type first."""
    schema |= schema.pop("anyOf")[0]
    del schema["default"]


def _usual(name: str) -> Any:
    said = f"{USUAL[name]}; empty: as in the profile or params.yaml"
    return Field(None, description=said, json_schema_extra=_may_be_empty)


class PipelineSettings(BaseModel):
    """One run of the pipeline, in a git worktree of its own. What is left empty stays as it is committed."""

    model_config = ConfigDict(extra="forbid")

    seeds: list[NonNegativeInt] = Field(
        [], description="a run for each; without any, the seed of params.yaml"
    )
    beta: NonNegativeFloat | None = _usual("beta")
    steps: PositiveInt | None = _usual("steps")
    learning_rate: PositiveFloat | None = _usual("learning_rate")
    questions: PositiveInt | None = _usual("questions")
    overrides: list[str] = Field(
        [], description="of any other key of params.yaml, such as protocol.max_turns=3"
    )
    profile: str | None = Field(
        None, description="instead of params.yaml as it is committed", json_schema_extra=_may_be_empty
    )
    recipes: list[str] = Field([], description="rows of the paper's table, or all; needs a profile")
    targets: list[str] = Field([], description="only these stages and what they need")
    from_stage: str | None = Field(
        None, description="only this stage and what depends on it", json_schema_extra=_may_be_empty
    )
    force: bool = Field(False, description="execute the stages even if nothing has changed")
    dry_run: bool = Field(False, description="say what would be executed, and execute nothing")
    max_parallel: PositiveInt | None = Field(
        None,
        description="stages side by side; empty: as params.yaml says (workers.side_by_side)",
        json_schema_extra=_may_be_empty,
    )
    revision: str = Field("HEAD", description="commit, branch or tag to run")
    promote: bool = Field(False, description="offer this run's model as champion, as `dgpo promote` does")
    keep_worktree: bool = Field(False, description="keep it after success (after failure it is kept)")

    @property
    def changes(self) -> list[str]:
        """Return all that is laid over params.yaml but the seed, as `key=value`."""
        given = {key: getattr(self, name) for name, key in USUAL.items()}
        return [f"{key}={value}" for key, value in given.items() if value is not None] + self.overrides


DEFAULTS = PipelineSettings()


def with_overrides(params: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of params.yaml's content with each `key=value` laid over it.

    Values are YAML, read as DVC reads params.yaml (version 1.2: 1e-5 is a number). Whether a key exists is
    for the validation of the whole to say. Raises ValueError.
    """
    changed = copy.deepcopy(params)
    seen: set[str] = set()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not KEY.fullmatch(key):
            raise ValueError(f"overrides: {text!r} is not key=value, such as reinforce.beta=0.01")
        if key in seen:
            raise ValueError(f"overrides: {key} has two values")
        seen.add(key)
        *path, last = key.split(".")
        section = changed
        for name in path:
            if not isinstance(section.setdefault(name, {}), dict):
                raise ValueError(f"overrides: {key}: {name} is a value and has no keys")
            section = section[name]
        try:
            section[last] = parse(value)
        except ValueError as error:
            raise ValueError(f"overrides: {text}: {error}") from None
    return changed


def with_choices(schema: Mapping[str, Any], there: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return a flow's schema for the form, with what is `there` to choose from; see `choices`."""
    form = copy.deepcopy(dict(schema))
    for fields in (form, *form.get("definitions", {}).values()):
        for name, field in fields.get("properties", {}).items():
            names = there.get(CHOICES.get(name, ""))
            for kind in (field, *field.get("anyOf", ())) if names else ():
                if kind.get("type") in ("string", "array"):
                    kind.get("items", kind)["enum"] = names
            if "$ref" in field:
                field["default"] = {}  # or the form would send what was left empty as null
    return form


def choices(root: Path) -> dict[str, list[str]]:
    """Find the profiles, recipes and stages of a checkout, whichever profile and recipes a run has."""
    every = list(_every_params(root))
    rows = [name for params in every for kind in params["recipes"].values() for name in kind]
    names: list[str] = []
    with contextlib.suppress(UserError):
        for stage, node in read_yaml(root / "dvc.yaml")["stages"].items():
            names += (
                [f"{stage}@{item}" for item in _items(node["foreach"], every)]
                if "foreach" in node
                else [stage]
            )
    return {
        "profiles": sorted(path.stem for path in (root / PROFILES).glob("*.yaml")),
        "recipes": [*GROUPS, *dict.fromkeys(rows)] if rows else [],
        "stages": names,
    }


def _every_params(root: Path) -> Iterator[dict[str, Any]]:
    """Give the parameters of the checkout, and of each profile with its own recipes and with the paper's."""
    with contextlib.suppress(UserError):
        yield {"recipes": {}, **read_yaml(root / PARAMS)}
    for path in sorted((root / PROFILES).glob("*.yaml")):
        for recipes in (None, list(GROUPS)):
            with contextlib.suppress(UserError):
                yield resolve_profile(path, recipes)


def _items(each: Any, every: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a stage is repeated for: a list, or a key of any of the parameters."""
    found = EACH.fullmatch(str(each))
    if not found:
        return list(map(str, each))
    names: dict[str, None] = {}
    for params in every:
        value: Any = params
        for key in found["key"].split("."):
            value = value.get(key, {})
        names |= dict.fromkeys(map(str, value))
    return list(names)
