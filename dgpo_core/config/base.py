"""What all configuration sections share."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of params.yaml: unknown keys are refused, and values are never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)
