"""What a person asks. It needs no model, so that a mistake in it is said before one is loaded."""

import math
import unicodedata
from dataclasses import dataclass

from dgpo_core.errors import UserError
from dgpo_core.text import trimmed


class Stopped(Exception):
    """Whoever asked does not want the answer any more."""


@dataclass(frozen=True)
class Ask:
    """A question and how to answer it; None leaves a limit as the protocol has it.

    `temperature` 0 is greedy. `max_new_tokens` is of a turn; neither limit can be raised.
    """

    question: str
    temperature: float = 0.0
    seed: int = 0
    max_searches: int | None = None
    max_new_tokens: int | None = None

    def check(self) -> None:
        """Raise UserError for what no model could answer."""
        if not trimmed(self.question):
            raise UserError("the question is empty")
        if any(unicodedata.category(character) == "Cs" for character in self.question):
            raise UserError("the question is not valid Unicode: it has half a surrogate pair")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature: a number from 0 upwards, not {self.temperature}")
