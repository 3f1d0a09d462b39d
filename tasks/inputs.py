"""What the stages are given: models by name, episodes."""

from pathlib import Path

from dgpo_core.config.params import PARAMS, Params
from dgpo_core.config.recipes import STUDENT, TEACHER
from dgpo_core.errors import UserError
from tasks.paths import MODELS


def model_source(params: Params, model: str) -> str:
    """Folder or hub name of `student`, `teacher` or a recipe. Raises UserError for an unknown name."""
    if model in (STUDENT, TEACHER):
        return str(getattr(params.models, model))
    if model not in params.recipes.all:
        raise UserError(f"{PARAMS}: recipes has no {model!r}, only {sorted(params.recipes.all)}")
    return str(MODELS / model)


def local(source: str) -> list[Path]:
    """A model given as a folder is an input; one on the hub is pinned by its name."""
    return [Path(source)] if Path(source).is_dir() else []


def require_episodes(count: int, what: str) -> None:
    if count == 0:
        raise UserError(f"there are no {what}: nothing to train on")
