"""The command `dgpo`: what people type; the stages are programs of their own (`python -m tasks.<stage>`).

Commands import what they need when they run, so that `dgpo --help` is instant.
"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def use(
    profile: Annotated[str, typer.Argument(help="a profile of profiles/")],
    recipes: Annotated[list[str] | None, typer.Argument(help="rows of the paper's table, or all")] = None,
) -> None:
    """Write params.yaml from a profile."""
    from tasks.use import use as write_params

    write_params(profile, recipes or [])


@app.command()
def show(results: Annotated[Path, typer.Argument()] = Path("reports/results.json")) -> None:
    """Print the results of the last run."""
    from tasks.show import show as print_results

    print_results(results)


Model = Annotated[
    str | None,
    typer.Option(
        help="a recipe, student, teacher, a folder, or models:/name@alias; without it the registered "
        "champion, else the newest trained recipe"
    ),
]


@app.command()
def ask(
    question: Annotated[str, typer.Argument()],
    model: Model = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="of sampling, without effect on greedy")] = 0,
    max_searches: Annotated[
        int | None, typer.Option(min=0, help="at most protocol.max_turns, which is the default")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the episode as one JSON object")] = False,
    colour: Annotated[bool, typer.Option("--colour/--no-colour", help="on a terminal")] = True,
) -> None:
    """Ask the agent a question, and watch it search."""
    from dgpo_core.serving.agent import Ask
    from tasks.ask import ask as print_episode

    print_episode(model, Ask(question, temperature, seed, max_searches), as_json, colour)


@app.command()
def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="0.0.0.0: every machine that reaches this one may ask")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8080,
    waiting: Annotated[
        int, typer.Option(min=0, help="questions that may wait for the one being answered")
    ] = 8,
) -> None:
    """Serve the agent over HTTP: a page, and OpenAI's chat completions."""
    from tasks.serve import serve as run_service

    run_service(model, host, port, waiting)


def main() -> None:
    """Exits with 2 and one line for what the user can mend."""
    from tasks.stage import main as run_program

    run_program(app)


if __name__ == "__main__":
    main()
