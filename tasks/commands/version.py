"""`dgpo --version`."""

import typer


def print_version(wanted: bool) -> None:
    """Print the version and end, if it is `wanted`."""
    if wanted:
        from importlib.metadata import version

        print(f"dgpo {version('dgpo')}")
        raise typer.Exit
