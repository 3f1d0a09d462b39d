"""What a pipeline run can be asked for: the form on the dashboard."""

import copy
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from dgpo_core.config.yaml_text import parse

KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


def _override(text: str) -> str:
    key, equals, _ = text.partition("=")
    if not equals or not KEY.fullmatch(key):
        raise ValueError(f"{text!r} is not key=value, such as reinforce.beta=0.01")
    return text


Override = Annotated[str, AfterValidator(_override)]


class PipelineSettings(BaseModel):
    """One run of the pipeline, in a git worktree of its own; everything has a default."""

    model_config = ConfigDict(extra="forbid")

    profile: str | None = Field(None, description="of profiles/; without it, params.yaml as it is committed")
    recipes: list[str] = Field([], description="rows of the paper's table, or all; needs a profile")
    seeds: list[NonNegativeInt] = Field(
        [], description="a run for each; without any, the seed of params.yaml"
    )
    overrides: list[Override] = Field([], description="of params.yaml, such as reinforce.beta=0.01")
    targets: list[str] = Field([], description="only these stages and what they need")
    from_stage: str | None = Field(None, description="only this stage and what depends on it")
    force: bool = Field(False, description="execute the stages even if nothing has changed")
    dry_run: bool = Field(False, description="say what would be executed, and execute nothing")
    max_parallel: PositiveInt | None = Field(
        None, description="stages side by side; as params.yaml says (workers.side_by_side), if none"
    )
    revision: str = Field("HEAD", description="commit, branch or tag to run")
    promote: bool = Field(False, description="offer this run's model as champion, as `dgpo promote` does")
    keep_worktree: bool = Field(False, description="keep it after success (after failure it is kept)")


DEFAULTS = PipelineSettings()


def with_overrides(params: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a copy of params.yaml's content with each `key=value` laid over it.

    Values are YAML, read as DVC reads params.yaml (version 1.2: 1e-5 is a number). Whether a key exists is
    for the validation of the whole to say. Raises ValueError.
    """
    changed = copy.deepcopy(params)
    for text in overrides:
        key, _, value = text.partition("=")
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
