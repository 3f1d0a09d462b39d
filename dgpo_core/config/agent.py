"""Sections about episodes: the search protocol's limits, sampling, and the engine that generates.

No setting of an engine changes what is sampled, up to rounding.
"""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

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
    """How tokens are drawn."""

    temperature: NonNegativeFloat = Field(1.0, description="0 is greedy")


GREEDY = Sampling(temperature=0.0)


class VllmConfig(Section):
    """vLLM started by the stage itself, on the GPUs of the model in training where there is one."""

    tensor_parallel: PositiveInt = Field(1, description="GPUs that share one copy of the model")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of a GPU's memory; beside a model in training about 0.4"
    )
    sleep: bool = Field(False, description="gives the GPU's memory back while the model trains")
    eager: bool = Field(False, description="no CUDA graphs and no compilation: starts sooner, runs slower")


class ServerConfig(Section):
    """vLLM servers that run already, one for each copy of the model (docs/vllm.md)."""

    student: list[str] = Field([], description="URLs of those for the student and the recipes' models")
    teacher: list[str] = Field([], description="URLs of those for the teacher")
    concurrency: PositiveInt = Field(256, description="requests under way at each server")
    timeout: PositiveFloat = Field(600.0, description="seconds until a request is given up")
    attempts: PositiveInt = Field(4, description="at one request, with growing pauses between them")


class ProbeConfig(Section):
    """After each refresh the engine and the model in training compute the same log-probabilities."""

    prompts: PositiveInt = Field(4, description="training questions that the engine continues")
    tokens: PositiveInt = Field(32, description="sampled for each of them")
    tolerance: NonNegativeFloat = Field(
        0.1, description="mean absolute difference, nats, above which the stage stops"
    )


def slot_room(tokens: int) -> int:
    """Return for how many tokens a slot has room that must hold these: it doubles when it is too small."""
    return max(256, 1 << (tokens - 1).bit_length())


class RolloutConfig(Section):
    """How episodes are generated."""

    FREE = frozenset({"batch_tokens", "slots", "vllm", "server", "refresh", "weights_folder", "probe"})

    engine: Literal["transformers", "vllm", "vllm-server"] = "transformers"
    slots: PositiveInt = Field(
        64, description="episodes generated at a time (by each thread, on a processor); of transformers"
    )
    batch_tokens: PositiveInt = Field(
        65_536, description="padded tokens of a pass that reads prompts and passages; of the same"
    )
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    vllm: VllmConfig = VllmConfig()
    server: ServerConfig = ServerConfig()
    refresh: Literal["file", "transfer"] = Field(
        "file", description="how vLLM gets new weights: a folder that it reads, or vLLM's weight transfer"
    )
    weights_folder: str = Field(
        ".state/weights", description="of refresh: file; servers must see it under the same absolute path"
    )
    probe: ProbeConfig = ProbeConfig()
