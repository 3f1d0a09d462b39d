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


def main() -> None:
    """Exits with 2 and one line for what the user can mend."""
    from tasks.stage import main as run_program

    run_program(app)


if __name__ == "__main__":
    main()
