"""The commands `dgpo collections ...`; they import what they need when they run."""

from typing import Annotated

import typer

collections = typer.Typer(no_args_is_help=True, help="The index's collections on a Qdrant server.")


@collections.command("list")
def list_collections() -> None:
    """Print the pipeline's collections, and which of them readers use."""
    from tasks.commands.collections import show

    show()


@collections.command()
def build() -> None:
    """Make the collection of data/index with the settings of params.yaml, and let readers use it."""
    from tasks.commands.collections import build as make

    make()


@collections.command()
def remove(name: str) -> None:
    """Remove a collection that no reader uses."""
    from tasks.commands.collections import remove as delete

    delete(name)


@collections.command()
def snapshot() -> None:
    """Make a snapshot of the collection that readers of data/index use."""
    from tasks.commands.collections import snapshot as keep

    keep()


@collections.command()
def restore(
    source: Annotated[str, typer.Argument(help="file:///... on the server, or a URL that it can fetch")],
) -> None:
    """Make the collection of a snapshot instead of the vectors of data/index; checked like any other."""
    from tasks.commands.collections import restore as bring_back

    bring_back(source)
