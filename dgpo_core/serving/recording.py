"""What a service remembers of the questions that it answered, for somebody who keeps them."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pydantic import BaseModel, Field

from dgpo_core.serving.events import Delta, EpisodeEnd, EpisodeRecord, Event, SearchResult

Period = tuple[float, float]  # start and end, in seconds since the epoch


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with its episode, as the response `id` had it, and when what happened.

    The time of a turn is that of the model's text; that of a search follows its turn.
    """

    id: str
    episode: EpisodeRecord
    asked: Period
    turns: dict[int, Period] = field(default_factory=dict)
    searches: dict[int, Period] = field(default_factory=dict)  # turn -> period


class Rating(BaseModel):
    """What somebody thinks of the answer `id`."""

    id: str = Field(max_length=100)
    thumb: Literal["up", "down"]
    comment: str | None = Field(None, max_length=2000)


class Recorder(Protocol):
    """Keeps answers. Its methods return at once and raise nothing, whatever becomes of what they get."""

    def keep(self, answered: AnsweredQuestion) -> None:
        """Keep an answered question."""

    def rate(self, rating: Rating) -> bool:
        """Keep a rating, the latest one of an answer; False for an answer that it does not know."""


async def recorded(events: AsyncIterator[Event], response: str, recorder: Recorder) -> AsyncIterator[Event]:
    """Yield the events of the request with this response, and give its episode to the recorder."""
    start = latest = time.time()
    turns: dict[int, Period] = {}
    searches: dict[int, Period] = {}
    async with aclosing(events):  # type: ignore[type-var]
        async for event in events:
            now = time.time()
            match event:
                case Delta():
                    turns[event.turn] = (turns.get(event.turn, (latest, 0.0))[0], now)
                    latest = now
                case SearchResult():
                    searches[event.turn] = (latest, now)
                    latest = now
                case EpisodeEnd():
                    asked = (start, now)
                    recorder.keep(AnsweredQuestion(response, event.episode, asked, turns, searches))
            yield event
