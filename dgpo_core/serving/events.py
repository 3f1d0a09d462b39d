"""What a person asks. It needs no model, so that a mistake in it is said before one is loaded.

What kind each piece of a model's text is, told while the text arrives.

What is told of an episode: events while it unfolds, and its record for people.
"""

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dgpo_core.agent.episode import Ending
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


Kind = Literal["think", "search", "answer", "forged", "text"]
Piece = tuple[Kind, str]

# `forged`: an information block that the model wrote itself; the environment's never passes through here
_KINDS: dict[str, Kind] = {"think": "think", "search": "search", "answer": "answer", "information": "forged"}
_TAG = re.compile(f"<(/?)({'|'.join(_KINDS)})>")
_LONGEST = max(len(f"</{name}>") for name in _KINDS)


class TagSplitter:
    """Cuts the text of one turn at its tags, however the text is cut into chunks.

    Every tag is a boundary and belongs to no piece: an opening one begins its kind, a closing one ends
    whatever was open. So the kinds are known without the text that follows. What may be the beginning of a
    tag is held back until it is one or is not.
    """

    def __init__(self) -> None:
        self._kind: Kind = "text"
        self._held = ""

    def feed(self, chunk: str) -> list[Piece]:
        """The pieces that are certain now, without empty ones."""
        text = self._held + chunk
        pieces: list[Piece] = []
        end = 0
        for match in _TAG.finditer(text):
            pieces.append((self._kind, text[end : match.start()]))
            self._kind = "text" if match[1] else _KINDS[match[2]]
            end = match.end()
        cut = max(end, _open_end(text))
        pieces.append((self._kind, text[end:cut]))
        self._held = text[cut:]
        return [piece for piece in pieces if piece[1]]

    def close(self) -> list[Piece]:
        """What was held back: the turn ended inside it, so it is no tag."""
        held, self._held = self._held, ""
        return [(self._kind, held)] if held else []


def _open_end(text: str) -> int:
    """Where an unfinished tag at the end of `text` begins; its length when there is none."""
    start = text.rfind("<", max(0, len(text) - _LONGEST + 1))
    begun = text[start:]
    tags = (f"<{slash}{name}>" for slash in ("", "/") for name in _KINDS)
    return start if start >= 0 and any(tag.startswith(begun) for tag in tags) else len(text)


class Told(BaseModel):
    model_config = ConfigDict(frozen=True)


class Found(Told):
    """A retrieved passage in full; what the model saw of it may be shorter (protocol.max_information)."""

    id: str
    title: str
    text: str
    score: float


class Waiting(Told):
    """Nothing has begun: `ahead` other episodes come first."""

    kind: Literal["waiting"] = "waiting"
    ahead: int


class Delta(Told):
    """A piece of what the model writes in its turn number `turn` (from 0), without tags."""

    kind: Kind
    turn: int
    text: str


class Information(Told):
    """What the index answered to the query of a turn, best first."""

    kind: Literal["information"] = "information"
    turn: int
    query: str
    passages: list[Found]


class Notice(Told):
    """The environment's message after a turn that neither searched nor answered."""

    kind: Literal["notice"] = "notice"
    turn: int
    text: str


class Source(Told):
    """A retrieved passage in which the answer stands; `number` counts from 1."""

    number: int
    id: str
    title: str


class Step(Told):
    """Text of one kind, as it stands in the episode; of `information`, what the model saw."""

    kind: Kind | Literal["information", "notice"]
    turn: int
    text: str


class Record(Told):
    """A finished episode. `answer` is None when the model gave none; `failure` says what broke down.

    There is no golden answer, so nothing here says whether the answer is right.
    """

    question: str
    model: str
    answer: str | None
    sources: list[Source]
    ending: Ending
    failure: str | None
    steps: list[Step]
    searches: list[Information]
    response: str
    well_formed: bool
    invalid_actions: int
    temperature: float
    seed: int
    model_tokens: int
    other_tokens: int  # prompt and retrieved text


class Finished(Told):
    kind: Literal["finished"] = "finished"
    episode: Record


Event = Waiting | Delta | Information | Notice | Finished
