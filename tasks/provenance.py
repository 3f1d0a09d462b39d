"""What a run was made of, in words that can be compared: commit, settings, dvc.lock. Knows no MLflow."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from dgpo_core.config.params import PARAMS, Params, load_params, paper_recipes, resolve_profile
from dgpo_core.errors import UserError
from tasks.dvc_lock import LOCK, read_lock
from tasks.git import ask

PROFILES = Path("profiles")
# Recorded in every run anyway, and written while it lasts (`dvc.lock` by DVC, `params.yaml` by `make use`).
RECORDED = (LOCK, PARAMS)
NAMED = {"distill": "recipe", "reinforce": "recipe", "evaluate": "model", "base-model": "model"}


def locked_outputs(root: Path = Path()) -> dict[str, dict[str, str]]:
    """Stage -> path -> DVC's md5; empty without a dvc.lock that can be read: tracking goes on."""
    with suppress(OSError, UserError):
        return {name: stage.outs for name, stage in read_lock(root).items()}
    return {}


def lock_digest(root: Path = Path()) -> str | None:
    """SHA-256 of dvc.lock."""
    with suppress(OSError):
        return hashlib.sha256((root / LOCK).read_bytes()).hexdigest()
    return None


def git_commit(root: Path = Path()) -> str:
    """The commit that is checked out; empty outside git."""
    return (ask("rev-parse", "HEAD", root=root) or "").strip()


def git_dirty(root: Path = Path()) -> bool | None:
    """Whether a tracked file differs from the commit, RECORDED ones aside; None outside git."""
    others = [f":(exclude){path}" for path in RECORDED]
    changed = ask("status", "--porcelain", "--untracked-files=no", "--", ".", *others, root=root)
    return None if changed is None else bool(changed)


def uncommitted(path: Path, root: Path = Path()) -> bool:
    """Return whether a file differs from the commit, or is in none; False outside git, where nothing is."""
    return bool(ask("status", "--porcelain", "--", str(path), root=root))


def labels(root: Path = Path()) -> dict[str, str]:
    """Tags of every run: commit, whether that is all of the code, profile and seed, as far as known."""
    found = {"git.commit": commit} if (commit := git_commit(root)) else {}
    if (dirty := git_dirty(root)) is not None:
        found["git.dirty"] = str(dirty).lower()
    if params := settings(root):
        found |= {"profile": params.profile, "seed": str(params.seed)}
    return found


def stage_labels(stage: str) -> dict[str, str]:
    """What the part after `@` names: `distill@kd` -> {"recipe": "kd"}, `evaluate@kd` -> {"model": "kd"}."""
    kind, _, item = stage.partition("@")
    return {NAMED[kind]: item} if item and kind in NAMED else {}


def settings(root: Path = Path()) -> Params | None:
    """params.yaml; None where it is missing or invalid, which the stage that reads it will say."""
    with suppress(UserError):
        return load_params(root / PARAMS)
    return None


def changed_settings(params: Params, root: Path = Path()) -> dict[str, Any]:
    """The sections of params.yaml that somebody edited: what differs from its profile, nested as there.

    Which of the paper's recipes were chosen is no difference; a row that the paper does not have is one.
    Empty for a profile that there is not.
    """
    with suppress(UserError):
        rows = params.recipes.all.keys() & paper_recipes(["all"]).all.keys()
        path = root / PROFILES / f"{params.profile}.yaml"
        profile = resolve_profile(path, sorted(rows) or None)
        return _difference(params.model_dump(mode="json", exclude={"compare"}), profile)
    return {}


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in ours.items():
        other = theirs.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            if inner := _difference(value, other):
                changed[key] = inner
        elif value != other:
            changed[key] = value
    return changed
