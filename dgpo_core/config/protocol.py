"""The search protocol's limits and how rollouts sample."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from dgpo_core.config.base import Section


class ProtocolConfig(Section):
    """Limits in tokens unless said otherwise (docs/method.md, "The protocol")."""

    instruction: Literal["paper", "short"] = Field("paper", description="key of prompts.INSTRUCTIONS")
    max_turns: NonNegativeInt = Field(4, description="turns in which a search is answered")
    max_context: PositiveInt = 4096
    max_new_tokens: PositiveInt = Field(500, description="a turn")
    max_information: PositiveInt = Field(500, description="retrieved text a turn")
    documents: Literal["plain", "release"] = Field(
        "plain",
        description="how passages are shown: as Search-R1's release does, on which published models were "
        "trained (titles in quotes, no line break before </information>), or plain, as embedded ones know",
    )
    answer_scope: Literal["response", "prompt_and_response"] = Field(
        "response", description="where the prediction is looked for: the model's turns, or the whole text"
    )


class Sampling(Section):
    temperature: NonNegativeFloat = Field(1.0, description="0 is greedy")


GREEDY = Sampling(temperature=0.0)
