"""Embedded world and base models."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dgpo_core.config.base import Section


class QuestionCounts(Section):
    """Questions per set and split."""

    train: PositiveInt = 1000
    dev: PositiveInt = 100
    test: PositiveInt = 200
    hard: PositiveInt = 125


class WorldConfig(Section):
    """The generated encyclopedia (`dgpo_core.datasets.world`)."""

    seed: NonNegativeInt = 1
    passages: int = Field(2000, ge=100, description="about how many passages")
    ambiguity: float = Field(
        0.3, ge=0, le=1, description="chance that a book, city or university has the name of another entity"
    )
    rare_share: float = Field(0.25, ge=0, lt=1, description="share of entities with a single passage")
    distractors: NonNegativeInt = Field(1, description="sentences a passage that answer no question")
    asked: list[Literal["name", "word", "year"]] = Field(
        ["name", "word", "year"],
        min_length=1,
        description="kinds of values that chains of facts may ask for; comparisons always need years",
    )
    comparison_share: float = Field(0.2, ge=0, le=1, description="comparisons in the two-hop sets")
    questions: QuestionCounts = QuestionCounts()


class ModelShape(Section):
    """Architecture of an embedded base model."""

    architecture: Literal["qwen2", "llama"] = "qwen2"
    hidden_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    intermediate_size: PositiveInt

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError("hidden_size must be divisible by twice the number of heads (rotary halves)")
        return self


class PhaseConfig(Section):
    """One phase of building a base model, with a learning-rate cycle of its own."""

    kind: Literal["reading", "protocol"] = Field(
        description="the reading drill, or scripted episodes of the protocol"
    )
    steps: PositiveInt
    batch_size: PositiveInt = Field(64, description="sequences a step")
    learning_rate: PositiveFloat = Field(3e-3, description="of embeddings and vectors (AdamW)")
    matrix_learning_rate: PositiveFloat = Field(0.01, description="of the layers' matrices (Muon)")
    warmup_steps: NonNegativeInt = 50
    one_passage: float = Field(
        0.4, ge=0, le=1, description="reading: share of the steps with one passage, first"
    )
    two_passages: float = Field(
        0.4, ge=0, le=1, description="reading: share with two, then; the rest has three"
    )

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.one_passage + self.two_passages > 1:
            raise ValueError("one_passage and two_passages are shares: together at most 1")
        return self

    def passages(self, step: int) -> int:
        """Passages of a reading example of `step`, which counts from 0."""
        if step < self.one_passage * self.steps:
            return 1
        return 2 if step < (self.one_passage + self.two_passages) * self.steps else 3


class BaseModelConfig(Section):
    """One model to build."""

    shape: ModelShape
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of compute; weights are fp32. bfloat16 is slow where the processor has no instructions",
    )
    phases: list[PhaseConfig] = Field(min_length=1)


class BaseModelsConfig(Section):
    """Building the embedded student (a reader) and teacher (a reader that follows the protocol)."""

    seed: NonNegativeInt = 0
    world: WorldConfig = Field(
        WorldConfig(), description="of the training worlds, but for seed and questions"
    )
    worlds: PositiveInt = Field(24, description="training worlds; none is the evaluated one")
    first_world_seed: PositiveInt = 1000
    expert_episodes: PositiveInt = Field(9600, description="scripted episodes that teach the protocol")
    models: dict[str, BaseModelConfig] = Field({}, description="built into models/<name>")
