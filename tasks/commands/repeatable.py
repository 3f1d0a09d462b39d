"""Options of the command line that take several values at once."""

from typing import Any

from typer.core import TyperCommand, TyperOption


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
