"""The base of all sections of params.yaml."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """A part of params.yaml: unknown keys are refused, and values are never changed after loading."""

    # Keys that say where and how something runs, or judge its result, and change no result but by rounding:
    # what was begun under one value goes on under another, and dvc.yaml does not watch them.
    FREE: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _within_64_bits(cls, value: Any) -> Any:
        """Refuse whole numbers, seeds too, that torch, numpy, Parquet and Qdrant cannot take."""
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("must fit into 64 bits: below 2**63")
        return value
