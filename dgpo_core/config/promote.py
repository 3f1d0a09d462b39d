"""When a trained model takes the champion's place (docs/operations.md, "Promote a model")."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from dgpo_core.config.base import Section


class PromoteConfig(Section):
    """What a challenger must show; intervals are paired bootstrap intervals of 95 %."""

    recipe: str | None = Field(None, description="whose model challenges; null: the last recipe of compare")
    min_gain: NonNegativeFloat = Field(
        0.0, description="the average EM's gain over the champion must be above it, with its whole interval"
    )
    first_min_gain: NonNegativeFloat = Field(
        0.0, description="the same over the student, for the first champion"
    )
    margin: PositiveFloat = Field(0.05, description="EM that a data set may lose at most (lower bound)")
    margins: dict[str, PositiveFloat] = Field({}, description="of test sets that have a margin of their own")
    arcap_margin: PositiveFloat = Field(0.05, description="the same for each measurement of ARCap")
    max_hacking: float = Field(0.1, ge=0, le=1, description="rate of each hacking check")
    max_failed: float = Field(0.01, ge=0, le=1, description="share of failed episodes")
    min_questions: int = Field(100, ge=2, description="that count, in each data set and measurement")
    samples: PositiveInt = Field(10_000, description="of the bootstrap")
    seed: NonNegativeInt = Field(0, description="of the bootstrap")
    approval: bool = Field(True, description="a person is asked before the champion changes")
    log_weights: bool = Field(
        False, description="keep the weights in MLflow; false: where they are, and their hash"
    )

    def margin_of(self, dataset: str) -> float:
        return self.margins.get(dataset, self.margin)
