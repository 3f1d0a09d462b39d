"""Recipes: how the compared systems are trained, each a line of data (docs/method.md, "Recipes")."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dgpo_core.config.base import Section

# A recipe's name: part of folders' and DVC stages' names and, two of them joined by -, of the reports' pairs.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*")
TABLE = Path(__file__).with_name("recipes.yaml")  # the paper's rows
VARIANTS = TABLE.with_name("variants.yaml")
STUDENT, TEACHER = "student", "teacher"  # the given models


Keep = Literal["all", "correct", "searched", "evidence"]


class Distillation(Section):
    """Training on a teacher's distributions."""

    start: str = Field(description="student, or the recipe whose model is trained further")
    objective: Literal["kd", "ce", "taid", "skew_kl", "skew_reverse_kl", "reverse_kl", "jsd", "k1"] = Field(
        description="kd: cross-entropy and forward KL (eq. 1); ce: cross-entropy alone; k1: estimated KL"
    )
    episodes: Literal["teacher", "student", "mixed", "corpus"] = Field(
        "teacher",
        description="whose; mixed: DistiLLM's adaptive choice; corpus: no episodes, but the corpus's text",
    )
    layers: PositiveInt | None = Field(
        None, description="of `start`'s that are kept: first, last and evenly between; null: all"
    )
    keep: Keep = Field(
        "correct",
        description="of the teacher's episodes; searched: correct after a search, evidence: with a hit",
    )
    settings: dict[str, Any] = Field({}, description="keys of `distill` that differ for this recipe")

    @property
    def needs_distributions(self) -> bool:
        """Return whether it learns from the teacher's distributions, not from the text of its episodes."""
        return self.objective != "ce"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.objective in ("kd", "ce") and self.episodes not in ("teacher", "corpus"):
            raise ValueError(
                f"objective {self.objective} imitates the text of episodes, so they must be the teacher's: "
                "set episodes: teacher, or another objective"
            )
        if self.objective == "k1" and (self.settings.get("on_policy") or {}).get("intervention"):
            raise ValueError("objective k1 estimates by what the student has sampled: no intervention")
        if self.objective == "k1" and self.episodes != "student":
            raise ValueError(
                "objective k1 estimates KL[student || teacher] by what the student has sampled: "
                "set episodes: student"
            )
        return self


REWARDS = ("k1", "k2", "k3", "abs", "reverse_kl")


class Reinforcement(Section):
    """Reinforcement learning, in which a gate decides which episodes are pulled towards a reference."""

    start: str = Field(description="student, or the recipe whose model is trained further")
    algorithm: Literal["ppo", "grpo", "reinforce"] = "ppo"
    guidance: Literal["selective", "teachable", "uniform", "none"] = Field(
        description="selective: wrong episodes (eq. 4); teachable: where the teacher was right"
    )
    reference: Literal["teacher", "initial", "none"] = Field(
        "none", description="initial: the model that RL starts from"
    )
    placement: Literal["reward", "loss"] = Field(
        "reward", description="of the KL to the reference: in the reward (eq. 4), or a term of the loss"
    )
    divergence: Literal["k1", "k2", "k3", "abs", "reverse_kl", "forward_kl"] = Field(
        "k1",
        description="what stands for the KL; in the reward only k1 is eq. 4 (docs/method.md, Estimators)",
    )
    weight: PositiveFloat | None = Field(
        None, description="of the KL as a term of the loss; that in the reward is reinforce.beta"
    )
    turns: Literal["equal", "last", "sod"] = Field(
        "equal",
        description="which of an episode count in a KL of the loss; last: the last one alone, which decides "
        "whether to answer, and what; sod: each the less, the further it is from the reference",
    )
    settings: dict[str, Any] = Field({}, description="keys of `reinforce` that differ for this recipe")

    @property
    def needs_distributions(self) -> bool:
        """Return whether the teacher's distributions pull it."""
        return self.reference == "teacher"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.guidance != "none" and self.reference == "none":
            raise ValueError(f"guidance {self.guidance} needs a reference: teacher or initial")
        if self.guidance == "none" and self.reference != "none":
            raise ValueError("a reference is for guidance: set guidance, or reference: none")
        if self.placement == "loss" and (self.guidance == "none" or self.weight is None):
            raise ValueError("placement loss needs a weight of the KL, and a guidance")
        if self.placement == "reward" and self.weight is not None:
            raise ValueError("weight is for placement loss; the reward's is reinforce.beta")
        if self.placement == "reward" and self.turns != "equal":
            raise ValueError(f"turns {self.turns} is for placement loss")
        if self.placement == "reward" and self.divergence not in REWARDS:
            raise ValueError(f"divergence {self.divergence} is for placement loss; a reward takes {REWARDS}")
        return self


Recipe = Distillation | Reinforcement


class Recipes(Section):
    """The table: name -> recipe."""

    distill: dict[str, Distillation] = Field({}, description="trained by the stage distill")
    reinforce: dict[str, Reinforcement] = Field({}, description="trained by the stage reinforce")

    @property
    def all(self) -> dict[str, Recipe]:
        """Return both groups' rows."""
        return {**self.distill, **self.reinforce}

    @property
    def with_distributions(self) -> list[str]:
        """Return the names of the rows that need the teacher's distributions."""
        return [name for name, row in self.all.items() if row.needs_distributions]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rows = self.all
        if odd := [name for name in rows if not NAME.fullmatch(name)]:
            raise ValueError(f"{odd[0]!r} is no name of a recipe: letters, digits and _ only")
        if twice := self.distill.keys() & self.reinforce.keys():
            raise ValueError(f"{sorted(twice)} stand under both distill and reinforce")
        if taken := {STUDENT, TEACHER} & rows.keys():
            raise ValueError(f"{sorted(taken)} are names of given models")
        for name, recipe in rows.items():
            if recipe.start not in (STUDENT, *rows):
                raise ValueError(
                    f"{name}.start: there is no {recipe.start!r}, only {STUDENT} and {sorted(rows)}"
                )
            path = [name]
            while (start := rows[path[-1]].start) in rows:
                if start in path:
                    raise ValueError(f"{name}.start: a cycle: {' <- '.join([*path, start])}")
                path.append(start)
        return self

    def with_others(self, others: "Recipes") -> "Recipes":
        """Add the rows of `others` whose names are not taken."""
        taken = self.all.keys()
        return Recipes(
            distill=self.distill | {name: row for name, row in others.distill.items() if name not in taken},
            reinforce=self.reinforce | {n: row for n, row in others.reinforce.items() if n not in taken},
        )

    def only(self, names: Iterable[str]) -> "Recipes":
        """Select the named rows and those that they start from. Raises ValueError for an unknown name."""
        rows, wanted = self.all, set()
        for name in names:
            while name != STUDENT and name not in wanted:
                if name not in rows:
                    raise ValueError(f"there is no recipe {name!r}; there are: {', '.join(rows)}")
                wanted.add(name)
                name = rows[name].start
        return Recipes(
            distill={name: row for name, row in self.distill.items() if name in wanted},
            reinforce={name: row for name, row in self.reinforce.items() if name in wanted},
        )
