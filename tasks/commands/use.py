"""`dgpo use`: resolve a profile, with rows of the paper's table, into params.yaml."""

from pathlib import Path

from dgpo_core.config.params import PARAMS, resolve_profile
from dgpo_core.config.yaml_text import as_text
from dgpo_core.errors import UserError
from dgpo_core.files import write_text

PROFILES = Path("profiles")


def use(profile: str, recipes: list[str]) -> None:
    """Write every setting of the profile, resolved; DVC then knows which stages it concerns."""
    path = profile_path(profile)
    text = as_text(resolve_profile(path, recipes))
    head = f"# Written by `dgpo use {profile}`; edit freely, or use `dvc exp run -S`.\n"
    write_text(PARAMS, head + text)
    print(f"{PARAMS}: profile {profile}{', recipes: ' if recipes else ''}{' '.join(recipes)}")


def profile_path(profile: str, root: Path = Path()) -> Path:
    """Return a profile's file. Raises UserError with the profiles that there are."""
    path = root / PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = (
            ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
            or "none (is this the checkout's root?)"
        )
        raise UserError(f"{path}: no such profile; there are: {known}")
    return path
