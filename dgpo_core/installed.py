"""Check that this Python is that of the project's environment, with the standard library alone."""

import importlib.util
import sys

FIRST = ("pydantic", "rich", "ruamel", "typer")  # of what is installed, what programs import first


def require_installed() -> None:
    """End a program (`python -m ...`) with 2 and one line where the project's packages are missing."""
    missing = [name for name in FIRST if importlib.util.find_spec(name) is None]
    if missing and sys.argv[0] == "-m":  # as it is while the program's package is imported
        print(
            f"error: {sys.executable} does not have {', '.join(missing)}: activate the project's environment "
            "(source .venv/bin/activate), or make it (make demo)",
            file=sys.stderr,
        )
        raise SystemExit(2)
