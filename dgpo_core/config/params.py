"""params.yaml as a whole: loading it, resolving a profile into it, and errors with the key's path."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, NonNegativeInt, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dgpo_core.config.base import Section
from dgpo_core.config.data import BaseModelsConfig, WorldConfig
from dgpo_core.config.protocol import ProtocolConfig, RolloutConfig
from dgpo_core.config.questions import QuestionSetsConfig
from dgpo_core.config.retrieval import RetrievalConfig
from dgpo_core.config.training import (
    ComputeConfig,
    DistillConfig,
    EvaluateConfig,
    Recipe,
    ReinforceConfig,
    TeachConfig,
)
from dgpo_core.errors import UserError

PARAMS = Path("params.yaml")


class ModelSources(Section):
    """Folders or hub names of the two models that a run starts from."""

    student: str = "Qwen/Qwen2.5-0.5B-Instruct"
    teacher: str = "omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct"


class Params(Section):
    """Every setting of a run."""

    profile: str = Field(description="the profile that this file was resolved from")
    seed: NonNegativeInt = Field(0, description="of the training stages")
    world: WorldConfig = WorldConfig()
    base_models: BaseModelsConfig = BaseModelsConfig()
    models: ModelSources = ModelSources()
    questions: QuestionSetsConfig = QuestionSetsConfig()
    compute: ComputeConfig = ComputeConfig()
    protocol: ProtocolConfig = ProtocolConfig()
    rollout: RolloutConfig = RolloutConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    teach: TeachConfig = TeachConfig()
    distill: DistillConfig = DistillConfig()
    reinforce: ReinforceConfig = ReinforceConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    recipes: dict[str, Recipe] = Field({}, description="systems to compare, by name")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if taken := {"student", "teacher", "base"} & set(self.recipes):
            raise ValueError(f"recipes: {sorted(taken)} are names of given models")
        if self.reinforce.old_logprobs == "rollout" and self.rollout.precision != self.compute.precision:
            raise ValueError(
                "reinforce.old_logprobs: rollout needs rollout.precision equal to compute.precision"
            )
        first = self.base_models.first_world_seed
        if first <= self.world.seed < first + self.base_models.worlds:
            raise ValueError(f"world.seed: the base models were trained on worlds {first} and following")
        return self

    def recipe(self, name: str) -> Recipe:
        """Raises UserError with the names there are."""
        if name not in self.recipes:
            raise UserError(f"{PARAMS}: recipes has no {name!r}, only {sorted(self.recipes)}")
        return self.recipes[name]


def load_params(path: Path = PARAMS) -> Params:
    """The validated parameters. Raises UserError with file, key and what is wrong, for the first few keys."""
    return _validated(_read_yaml(path), path)


def resolve_profile(path: Path) -> dict[str, Any]:
    """A profile's differences laid over the defaults: what params.yaml holds, in full."""
    overrides = _read_yaml(path)
    params = _validated({"profile": path.stem, **overrides}, path)
    return params.model_dump(mode="json")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping of sections, found {type(content).__name__}")
    return content


def _validated(content: dict[str, Any], path: Path) -> Params:
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        problems = []
        for detail in error.errors()[:5]:
            key = ".".join(map(str, detail["loc"])) or "(top level)"
            message = detail["msg"].removeprefix("Value error, ")
            if detail["type"] == "extra_forbidden":
                message = "unknown key"
            found = "" if isinstance(detail["input"], dict) else f" (found {detail['input']!r})"
            problems.append(f"{key}: {message}{found}")
        raise UserError(f"{path}: {'; '.join(problems)}") from error
