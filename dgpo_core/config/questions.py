"""Which question sets are trained and tested on."""

import re
from typing import Self

from pydantic import Field, model_validator

from dgpo_core.config.base import Section

PAPER_SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
TRAINING_SETS = ("nq", "hotpotqa")  # those that the paper trains on
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # becomes part of paths and of metrics' names


class QuestionSetsConfig(Section):
    train: list[str] = Field(["nq", "hotpotqa"], min_length=1)
    test: dict[str, str] = Field(
        {name: name for name in PAPER_SETS},
        min_length=1,
        description="set -> the paper's data set whose part it plays",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if unknown := set(self.test.values()) - set(PAPER_SETS):
            raise ValueError(f"{sorted(unknown)} are none of the paper's data sets {list(PAPER_SETS)}")
        if len(set(self.train)) < len(self.train):
            raise ValueError("train: a set stands there twice")
        if odd := [name for name in (*self.train, *self.test) if not NAME.fullmatch(name)]:
            raise ValueError(f"{odd[0]!r} is no name of a set: letters, digits, _ and - only")
        return self

    def playing(self, role: str) -> str | None:
        """The set that plays the part of the paper's data set `role`, if any."""
        return next((name for name, part in self.test.items() if part == role), None)
