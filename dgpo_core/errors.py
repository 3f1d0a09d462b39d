"""Errors that are the user's to fix, told apart from bugs."""

import re


class UserError(Exception):
    """Bad input: a file, line or key that the user can correct.

    Stages print the message as one line and exit with code 2, without a traceback. The message names
    the place (file and line, or the key's path) and what to do about it.
    """


class InfrastructureError(Exception):
    """A part beside the models failed (retriever, engine): neither a right nor a wrong answer."""


def first_line(error: Exception) -> str:
    """What libraries explain in paragraphs, for a message of one line."""
    return str(error).strip().split("\n")[0]


def without_credentials(text: str) -> str:
    """`text` with the user and password of each URL in it (`https://<user>:<password>@host`) left out.

    For whatever is printed, logged or shown on a page: addresses come from users, with all that is in them.
    """
    return re.sub(r"(\w://)[^/\s]*@", r"\1", text)
