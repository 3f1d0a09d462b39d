"""Resolve a profile into params.yaml: `python -m tasks.use tiny`."""

import sys
from pathlib import Path

import yaml

from dgpo_core.config.params import PARAMS, resolve_profile
from dgpo_core.errors import UserError
from tasks.stage import main

PROFILES = Path("profiles")


def use(profile: str) -> None:
    """Write every setting of the profile, resolved; DVC then knows which stages it concerns."""
    path = PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise UserError(f"{path}: no such profile; there are: {known}")
    text = yaml.safe_dump(resolve_profile(path), sort_keys=False, allow_unicode=True)
    PARAMS.write_text(
        f"# Written by `make use PROFILE={profile}`; edit freely, or use `dvc exp run -S`.\n{text}"
    )
    print(f"{PARAMS}: profile {profile}")


if __name__ == "__main__":
    main(lambda: use(sys.argv[1] if len(sys.argv) > 1 else "tiny"))
