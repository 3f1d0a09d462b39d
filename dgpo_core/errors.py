"""Errors that users or operators can mend, told apart from bugs."""

import math
import re


class UserError(Exception):
    """Bad input: a file, line or key that the user can correct.

    Stages print the message as one line and exit with code 2, without a traceback. The message names
    the place (file and line, or the key's path) and what to do about it.
    """


class NotFinite(UserError):
    """A quantity that is nan or infinite: nothing can be learned from it, and its model is not to be kept."""

    def __init__(self, quantity: str, value: float, cure: str = "", step: int | None = None) -> None:
        """`cure` says what to do; `step` is the training step that the quantity belongs to."""
        place = "" if step is None else f" of step {step}"
        kind = "infinite" if math.isinf(value) else "not a number"
        self.cure = cure or "the model's weights are broken, or the precision is too narrow for it"
        self.quantity, self.value = quantity, value
        super().__init__(f"the {quantity}{place} is {kind}; {self.cure}")


class InfrastructureError(Exception):
    """A part beside the models failed (retriever, engine): neither a right nor a wrong answer."""


class ResourceError(InfrastructureError):
    """The machine lacks something (room, a permission, open files): the same again would fail again."""


def may_pass(status: int) -> bool:
    """Return whether the same HTTP request may be answered later: its server is overloaded, or has failed."""
    return status >= 500 or status in (408, 425, 429)


def first_line(error: Exception) -> str:
    """Return the first line of what a library explains in paragraphs."""
    return str(error).strip().split("\n")[0]


def without_credentials(text: str) -> str:
    """Return `text` without the user and password of each URL in it (`https://<user>:<password>@host`).

    For whatever is printed, logged or shown on a page: addresses come from users, with all that is in them.
    """
    return re.sub(r"(\w://)[^/\s]*@", r"\1", text)
