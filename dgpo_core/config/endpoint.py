"""The address of a model behind an OpenAI-compatible endpoint, and how it is asked."""

import re
from dataclasses import dataclass

from pydantic import Field, PositiveFloat, PositiveInt

from dgpo_core.config.base import Section

PREFIX = "openai:"
FORM = "openai:<model>@<base URL>, such as openai:qwen2.5-7b@http://127.0.0.1:8000/v1"
_ADDRESS = re.compile(rf"{PREFIX}(?P<model>\S+)@(?P<url>https?://[^@\s]+)")


@dataclass(frozen=True)
class Endpoint:
    """A model's name at a server, and the server's base URL (`.../v1`)."""

    model: str
    url: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.model}@{self.url}"


def endpoint_of(source: str) -> Endpoint | None:
    """Return the endpoint that `source` names, None for a folder or a name of the hub.

    Raises ValueError for what is meant as an endpoint and is none; a key has its place in the environment.
    """
    if match := _ADDRESS.fullmatch(source):
        return Endpoint(match["model"], match["url"].rstrip("/"))
    if source.startswith((PREFIX, "http://", "https://")):
        raise ValueError(f"{source!r} is no endpoint: write {FORM}, without a password")
    return None


class EndpointConfig(Section):
    """How an endpoint is asked."""

    key_variable: str = Field(
        "OPENAI_API_KEY", description="environment variable with the key; unset: the server wants none"
    )
    concurrency: PositiveInt = Field(8, description="requests under way")
    timeout: PositiveFloat = Field(300.0, description="seconds until a request is given up")
    attempts: PositiveInt = Field(6, description="at one request, with growing pauses between them")
