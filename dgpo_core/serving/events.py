"""What is told of an episode: events while it unfolds, and its record for people."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from dgpo_core.protocol.episode import Ending
from dgpo_core.serving.tags import Kind


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
