"""What a client asks, the events of the episode that answers it, and the finished episode's record.

Nothing here needs a model, so that a mistake in a question is found before one is loaded.
"""

import math
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from dgpo_core.agent.episode import Ending
from dgpo_core.errors import UserError
from dgpo_core.text import trimmed

if TYPE_CHECKING:
    from dgpo_core.retrieval.ranking import Hit


class EpisodeCancelled(Exception):
    """The client does not want the answer any more, or the service ends."""


@dataclass(frozen=True)
class AgentRequest:
    """A question and how to answer it; None leaves a limit as the protocol has it.

    `temperature` 0 is greedy. `max_new_tokens` is of a turn; neither limit can be raised. `history` has the
    lines of a conversation before the question, of which the model reads the latest, as far as they fit.
    """

    question: str
    temperature: float = 0.0
    seed: int = 0
    max_searches: int | None = None
    max_new_tokens: int | None = None
    history: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UserError for what no model could answer."""
        if not trimmed(self.question):
            raise UserError("the question is empty")
        if any(unicodedata.category(c) == "Cs" for text in (self.question, *self.history) for c in text):
            raise UserError("the question is not valid Unicode: it has half a surrogate pair")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature: a number from 0 upwards, not {self.temperature}")


# of a model's text; `forged` is an information block that the model wrote itself
TextKind = Literal["think", "search", "answer", "forged", "text"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class RetrievedPassage(_Frozen):
    """A retrieved passage in full; what the model saw of it may be shorter (protocol.max_information)."""

    id: str
    title: str
    text: str
    score: float


def retrieved(hit: "Hit") -> RetrievedPassage:
    """Return a hit of the index in full."""
    passage = hit.passage
    return RetrievedPassage(id=passage.id, title=passage.title, text=passage.text, score=hit.score)


class QueuePosition(_Frozen):
    """The episode has not begun: `ahead` other episodes come first."""

    kind: Literal["waiting"] = "waiting"
    ahead: int


class Delta(_Frozen):
    """A piece of what the model writes in its turn number `turn` (from 0), without tags."""

    kind: TextKind
    turn: int
    text: str


class SearchResult(_Frozen):
    """The index's answer to the query of a turn, best first."""

    kind: Literal["information"] = "information"
    turn: int
    query: str
    passages: list[RetrievedPassage]


class Notice(_Frozen):
    """The environment's message after a turn that neither searched nor answered."""

    kind: Literal["notice"] = "notice"
    turn: int
    text: str


class SourcePassage(_Frozen):
    """A retrieved passage in which the answer stands; `number` counts from 1."""

    number: int
    id: str
    title: str


class EpisodeStep(_Frozen):
    """Text of one kind, as it stands in the episode; of `information`, what the model saw."""

    kind: TextKind | Literal["information", "notice"]
    turn: int
    text: str


class EpisodeRecord(_Frozen):
    """A finished episode. `answer` is None when the model gave none; `failure` says what broke down.

    `unknown_words` are words of the question that no passage has which was found, not even by these words.
    There is no golden answer, so nothing here says whether the answer is right.
    """

    question: str
    model: str
    answer: str | None
    sources: list[SourcePassage]
    unknown_words: list[str]
    ending: Ending
    failure: str | None
    steps: list[EpisodeStep]
    searches: list[SearchResult]
    response: str
    well_formed: bool
    invalid_actions: int
    temperature: float
    seed: int
    model_tokens: int
    other_tokens: int  # prompt and retrieved text


class EpisodeEnd(_Frozen):
    """The episode is over, and did not fail."""

    kind: Literal["finished"] = "finished"
    episode: EpisodeRecord


Event = QueuePosition | Delta | SearchResult | Notice | EpisodeEnd
