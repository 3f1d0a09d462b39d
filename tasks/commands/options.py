"""Options that several commands have, each with one meaning, and how options are read."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

PrefectServer = Annotated[
    int | None,
    typer.Option(
        help="of Prefect's server on 127.0.0.1; without it PREFECT_API_URL, `dgpo up`'s server, or 4200",
        envvar="PREFECT_PORT",
    ),
]

Model = Annotated[
    str | None,
    typer.Option(
        help="a recipe, student, teacher, a folder, or models:/name@alias; without it the registered "
        "champion, else the last of the recipes that is trained"
    ),
]

AllowHost = Annotated[
    list[str] | None,
    typer.Option(help="another name by which clients call this machine, such as host.docker.internal"),
]

Host = Annotated[str, typer.Option(help="0.0.0.0: every machine that reaches this one may ask")]

AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(help="where a web page comes from whose scripts may ask, such as http://localhost:3000"),
]

Rate = Annotated[
    int | None, typer.Option(min=1, help="requests a minute of one address; without it as many as come")
]

History = Annotated[bool, typer.Option("--history", help="put the conversation before a question, too")]

KeepAnswers = Annotated[
    bool, typer.Option("--trace", help="keep questions, answers and thumbs as traces in MLflow")
]

PrefectPort = Annotated[int, typer.Option(help="on 127.0.0.1", envvar="PREFECT_PORT")]

MlflowPort = Annotated[int, typer.Option(help="on 127.0.0.1", envvar="MLFLOW_PORT")]


class Repeatable(TyperCommand):
    """A command whose repeatable options take several values at once: `--seed 0 1 2`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = (option for option in self.params if isinstance(option, TyperOption))
        repeatable = {name for option in options if option.multiple for name in option.opts}
        expanded: list[str] = []
        name = ""
        for arg in args:
            if arg.startswith("-"):
                name = arg if arg in repeatable else ""
            elif name and expanded[-1] != name:
                expanded.append(name)
            expanded.append(arg)
        return super().parse_args(ctx, expanded)


def print_version(wanted: bool) -> None:
    """Print the version and end, if it is `wanted`."""
    if wanted:
        from importlib.metadata import version

        print(f"dgpo {version('dgpo')}")
        raise typer.Exit
