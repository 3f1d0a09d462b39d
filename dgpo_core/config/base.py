"""What all configuration sections share."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of params.yaml: unknown keys are refused, and values are never changed after loading."""

    # keys that say where and how something runs, or judge its result, and change none but by rounding: what
    # was begun under one value goes on under another
    FREE: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )
