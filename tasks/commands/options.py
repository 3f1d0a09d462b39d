"""Options that several commands have, each with one meaning."""

from typing import Annotated

import typer

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
        "champion, else the newest trained recipe"
    ),
]

AllowHost = Annotated[
    list[str] | None,
    typer.Option(help="another name by which clients call this machine, such as host.docker.internal"),
]

PrefectPort = Annotated[int, typer.Option(help="on 127.0.0.1", envvar="PREFECT_PORT")]

MlflowPort = Annotated[int, typer.Option(help="on 127.0.0.1", envvar="MLFLOW_PORT")]
