"""params.yaml as a whole: sections, loading, profiles resolved into it, errors with the key's path."""

import copy
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from dgpo_core.config.agent import ProtocolConfig, RolloutConfig
from dgpo_core.config.base import Section
from dgpo_core.config.data import (
    PAPER_SETS,
    TRAINING_SETS,
    AuditConfig,
    BaseModelsConfig,
    DataConfig,
    QuestionSetsConfig,
    WorldConfig,
)
from dgpo_core.config.endpoint import Endpoint, endpoint_of
from dgpo_core.config.recipes import STUDENT, TABLE, TEACHER, VARIANTS, Distillation, Recipes, Reinforcement
from dgpo_core.config.retrieval import RetrievalConfig
from dgpo_core.config.training import (
    ComputeConfig,
    DistillConfig,
    DistributionsConfig,
    EvaluateConfig,
    ReinforceConfig,
    ReportConfig,
    TeachConfig,
    WatchConfig,
)
from dgpo_core.config.yaml_text import parse
from dgpo_core.errors import UserError


class WorkersConfig(Section):
    """Where stages that run models are executed: hints in dvc.yaml's `meta`, which DVC does not hash."""

    pool: Literal["cpu", "gpu"] = Field("gpu", description="pool whose workers run the stages with models")
    gpus: NonNegativeInt = Field(1, description="slots of Prefect's limit `dgpo-gpu` that such a stage takes")
    side_by_side: PositiveInt = Field(
        1, description="stages that run at a time, where nothing else is asked for"
    )
    timeout_minutes: PositiveInt = Field(
        2880, description="after which a flow takes such a stage for hung and ends it; its checkpoint stays"
    )


class PromoteConfig(Section):
    """When a model takes the champion's place (docs/promotion.md), by paired bootstrap intervals of 95 %."""

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
        """Return the EM that a test set may lose."""
        return self.margins.get(dataset, self.margin)


PARAMS = Path("params.yaml")
# keys of earlier versions: verl's `critic_warmup` means steps in which the critic alone learns
RENAMED = {
    "reinforce.actor_warmup": "reinforce.actor_learning_rate_warmup",
    "reinforce.critic_warmup": "reinforce.critic_learning_rate_warmup",
    "reinforce.kl_estimator": "divergence, in the rows of recipes.reinforce",
}
DATA_HINT = "the embedded world's sets need data.source: world, your own need data.source: files"
NO_RECIPES = Recipes()
Row = TypeVar("Row", Distillation, Reinforcement)


class ModelSources(Section):
    """The two models that a run starts from."""

    student: str = Field(
        "Qwen/Qwen2.5-0.5B-Instruct@7ae557604adf67be50417f59c2c2f167def9a775",
        description="a folder, or owner/name[@revision] of the hub",
    )
    teacher: str = Field(
        "omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct",
        description="the same, or openai:<model>@<base URL>: a model behind an endpoint (docs/data.md)",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if endpoint_of(self.student):
            raise ValueError("student: the student is trained: name a folder, or a model of the hub")
        endpoint_of(self.teacher)
        return self

    @property
    def endpoint(self) -> Endpoint | None:
        """Return where the teacher answers, if it is not a model that can be loaded here."""
        return endpoint_of(self.teacher)


class Params(Section):
    """Every setting of a run."""

    profile: str = Field(description="the profile that this file was resolved from")
    seed: NonNegativeInt = Field(0, description="of the training stages")
    data: DataConfig = DataConfig()
    world: WorldConfig = WorldConfig()
    base_models: BaseModelsConfig = BaseModelsConfig()
    models: ModelSources = ModelSources()
    questions: QuestionSetsConfig = QuestionSetsConfig()
    compute: ComputeConfig = ComputeConfig()
    protocol: ProtocolConfig = ProtocolConfig()
    rollout: RolloutConfig = RolloutConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    audit: AuditConfig = AuditConfig()
    teach: TeachConfig = TeachConfig()
    distributions: DistributionsConfig = DistributionsConfig()
    distill: DistillConfig = DistillConfig()
    reinforce: ReinforceConfig = ReinforceConfig()
    watch: WatchConfig = WatchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    promote: PromoteConfig = PromoteConfig()
    recipes: Recipes = Field(Recipes(), description="how models are trained")
    workers: WorkersConfig = WorkersConfig()
    compare: list[str] = Field(
        [STUDENT, TEACHER], min_length=1, description="given models and recipes to evaluate and report"
    )
    pair: Literal["qwen2.5-3b-to-0.5b", "qwen2.5-7b-to-0.5b", "llama3-8b-to-1b"] = Field(
        "qwen2.5-3b-to-0.5b", description="the paper's models whose figures stand beside ours"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if taken := self.base_models.models.keys() & self.recipes.all.keys():
            raise ValueError(f"recipes: {sorted(taken)} are names of base_models")
        if self.data.source == "published":
            if strange := set(self.questions.test) - set(PAPER_SETS):
                raise ValueError(f"questions.test: {sorted(strange)} are not published; {DATA_HINT}")
            if strange := set(self.questions.train) - set(TRAINING_SETS):
                raise ValueError(f"questions.train: only {list(TRAINING_SETS)} are published; {DATA_HINT}")
        if self.data.source == "files":
            sets = self.data.files.questions
            for key, names in (("train", self.questions.train), ("test", [*self.questions.test])):
                if strange := set(names) - sets.keys():
                    raise ValueError(
                        f"questions.{key}: {sorted(strange)} are not in data.files.questions {sorted(sets)}"
                    )
        if strange := self.report.first.keys() - self.questions.test.keys():
            raise ValueError(f"report.first: {sorted(strange)} are no test sets of questions.test")
        if strange := self.promote.margins.keys() - self.questions.test.keys():
            raise ValueError(f"promote.margins: {sorted(strange)} are no test sets of questions.test")
        if (challenger := self.promote.recipe) and challenger not in self.recipes.all:
            raise ValueError(f"promote.recipe: there is no {challenger!r}, only {sorted(self.recipes.all)}")
        known = [STUDENT, TEACHER, *self.recipes.all]
        if unknown := [model for model in self.compare if model not in known]:
            raise ValueError(f"compare: there is no {unknown[0]!r}, only {known}")
        if twice := [model for model in self.compare if self.compare.count(model) > 1]:
            raise ValueError(f"compare: {twice[0]!r} stands there twice")
        self._check_reinforcement(self.reinforce)
        for name, recipe in self.recipes.reinforce.items():
            own = self.for_recipe(name).reinforce
            if recipe.algorithm == "grpo" and own.batch_size < 2 * own.group_size:
                raise ValueError(f"reinforce.batch_size: {name} needs at least two groups of group_size")
            if recipe.algorithm == "grpo" and own.repeat_penalty:
                raise ValueError(f"reinforce.repeat_penalty: {name} is GRPO, which rewards no single turns")
            self._check_reinforcement(own)
        for name, row in self.recipes.distill.items():
            self.for_recipe(name)
            if row.layers and self.rollout.engine != "transformers":
                raise ValueError(
                    f"recipes.distill.{name}.layers: vLLM loads the whole of {row.start}: "
                    "set rollout.engine: transformers"
                )
        compute = self.compute
        if self.rollout.engine == "vllm" and (compute.processes > 1 or compute.hostfile):
            raise ValueError(
                "rollout.engine: vllm belongs to one process; for compute.processes use vllm-server, "
                "whose servers have GPUs of their own"
            )
        if self.rollout.engine != "transformers" and compute.lora:
            raise ValueError("rollout.engine: only transformers generates with compute.lora's adapters")
        narrow = compute.engine == "deepspeed" and compute.precision == "bfloat16"
        if narrow and self.rollout.precision == "float32":
            raise ValueError(
                "rollout.precision: DeepSpeed's weights have compute.precision, bfloat16: set both alike"
            )
        first = self.base_models.first_world_seed
        if first <= self.world.seed < first + self.base_models.worlds:
            raise ValueError(f"world.seed: the base models were trained on worlds {first} and following")
        return self

    @model_validator(mode="after")
    def _text_alone(self) -> Self:
        """Refuse what a teacher that gives text alone cannot do."""
        if self.models.endpoint is None:
            return self
        if wrong := self.recipes.with_distributions:
            raise ValueError(
                f"recipes: {', '.join(wrong)} need the teacher's distributions, and {self.models.teacher} "
                "gives text alone: use rows with objective: ce, or with reference: initial or none (seqkd, "
                "sft_ppo, ppo), or a teacher that can be loaded"
            )
        if TEACHER in self.compare:
            raise ValueError(
                "compare: teacher is an endpoint, whose texts cannot be continued from given ones, as "
                "ARCap does: leave it out"
            )
        return self

    @property
    def taught_by_text(self) -> bool:
        """Return whether the teacher's episodes are written as text: by an endpoint, or the expert."""
        return self.models.endpoint is not None or self.teach.policy == "expert"

    @property
    def episode_tokenizer(self) -> str:
        """Return the model in whose tokens the teacher's episodes are: the student, where text is written."""
        return self.models.student if self.taught_by_text else self.models.teacher

    @property
    def need_one_vocabulary(self) -> bool:
        """Return whether student and teacher must have one: a recipe trains on the teacher's tokens."""
        imitated = bool(self.recipes.distill) and not self.taught_by_text
        return imitated or bool(self.recipes.with_distributions)

    def _check_reinforcement(self, config: ReinforceConfig) -> None:
        """Raise ValueError for settings of RL that do not go with those of other sections."""
        if config.old_logprobs == "rollout" and self.rollout.engine != "transformers":
            raise ValueError(
                f"reinforce.old_logprobs: rollout.engine {self.rollout.engine} rounds otherwise "
                "than the model in training: set it to trainer"
            )
        if config.old_logprobs == "rollout" and self.rollout.precision != self.compute.precision:
            raise ValueError(
                "reinforce.old_logprobs: rollout needs rollout.precision equal to compute.precision"
            )
        if config.overlap and self.rollout.vllm.sleep:
            raise ValueError(
                "rollout.vllm.sleep: with reinforce.overlap vLLM is awake while the model trains"
            )

    def for_recipe(self, name: str) -> "Params":
        """Lay a recipe's own `settings` over its section. Raise ValueError for a wrong key or value."""
        group = "distill" if name in self.recipes.distill else "reinforce"
        section: Section = getattr(self, group)
        own: dict[str, Any] = self.recipes.all[name].settings
        if not own:
            return self
        try:
            merged = type(section).model_validate(overlay(section.model_dump(), own))
        except ValidationError as error:
            detail = error.errors()[0]
            key = ".".join(map(str, ("recipes", group, name, "settings", *detail["loc"])))
            message = "unknown key" if detail["type"] == "extra_forbidden" else detail["msg"]
            raise ValueError(f"{key}: {message.removeprefix('Value error, ')}") from None
        return self.model_copy(update={group: merged})

    def distillation(self, name: str) -> Distillation:
        """Return a row of recipes.distill. Raises UserError with the names there are."""
        return _row(self.recipes.distill, "distill", name)

    def reinforcement(self, name: str) -> Reinforcement:
        """Return a row of recipes.reinforce. Raises UserError with the names there are."""
        return _row(self.recipes.reinforce, "reinforce", name)

    @property
    def challenger(self) -> str | None:
        """Return the recipe whose model may become champion; None where no recipe is compared."""
        trained = [name for name in self.compare if name in self.recipes.all]
        return self.promote.recipe or (trained[-1] if trained else None)

    def sections(self, *names: str) -> dict[str, Any]:
        """Return sections as plain values without their free keys: what a stage's checkpoints depend on."""
        free = {name: set(getattr(getattr(self, name), "FREE", ())) for name in names}
        return self.model_dump(include=set(names), exclude=free)


def _row(rows: dict[str, Row], group: str, name: str) -> Row:
    if name not in rows:
        raise UserError(f"{PARAMS}: recipes.{group} has no {name!r}, only {sorted(rows)}")
    return rows[name]


def load_params(path: Path = PARAMS) -> Params:
    """Load and validate params.yaml. Raises UserError with file, key and what is wrong, for a few keys."""
    if not path.exists():
        raise UserError(
            f"{path}: no such file; run it in the checkout's root (`dgpo use <profile>` writes one)"
        )
    return validated(read_yaml(path), path)


def resolve_profile(
    path: Path, recipes: list[str] | None = None, own: Recipes = NO_RECIPES
) -> dict[str, Any]:
    """Lay a profile's differences over the defaults: the whole content of params.yaml.

    `recipes` names rows of the paper's table (`all`: every one) or of `own`, in place of the profile's,
    which are such names too, or rows of its own as params.yaml has them, which count more than the table's.
    Unless the profile says who is evaluated, it is the two given models (no endpoint) and all recipes. A
    profile may name another one of its folder in `extends`, whose differences lie below its own.
    """
    overrides, of_profile = _extended(path), NO_RECIPES
    wanted = overrides.pop("recipes", [])
    if isinstance(wanted, dict):
        of_profile = validated({"profile": path.stem, "recipes": wanted}, path).recipes
        wanted = list(of_profile.all)
    rows = paper_recipes(recipes or wanted, own, of_profile)
    overrides["recipes"] = rows.model_dump()
    if recipes and set(overrides.get("compare", ())) - {STUDENT, TEACHER, *rows.all}:
        del overrides["compare"]  # of the profile's own rows, which these take the place of
    params = validated({"profile": path.stem, "compare": [STUDENT], **overrides}, path)
    resolved = params.model_dump(mode="json")
    if "compare" not in overrides:
        given = [STUDENT] if params.models.endpoint else [STUDENT, TEACHER]
        resolved["compare"] = [*given, *params.recipes.all]
    return resolved


def _extended(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Lay a profile over those that it extends; its test sets take the place of theirs as a whole.

    Raises UserError for profiles that extend each other, or what is no profile's name.
    """
    if path in seen:
        raise UserError(f"{path}: extends itself: {' -> '.join(p.stem for p in (*seen, path))}")
    own = read_yaml(path)
    if (below := own.pop("extends", None)) is None:
        return own
    if not isinstance(below, str) or below != Path(below).name:
        raise UserError(f"{path}: extends: {below!r} is no name of a profile in its folder")
    lower = _extended(path.with_name(f"{below}.yaml"), (*seen, path))
    match own.get("questions"), lower.get("questions"):
        case {"test": dict()}, {"test": _, **others}:
            lower["questions"] = others
    return overlay(lower, own)


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay `above` over `below`: mappings are merged in depth, all else and an empty mapping replace."""
    merged = copy.deepcopy(below)
    for key, value in above.items():
        both = value and isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = overlay(merged[key], value) if both else copy.deepcopy(value)
    return merged


def paper_recipes(names: list[str], own: Recipes = NO_RECIPES, of_profile: Recipes = NO_RECIPES) -> Recipes:
    """Select rows of the paper's table (`all`: every one) and those that they start from. Raises UserError.

    Rows beyond the paper (`variants`: every one), of a profile and of `own` can be named too; where several
    have the name, the profile's row counts, then the tables'.
    """
    paper, variants = (Recipes.model_validate(content) for content in _tables())
    groups = {"all": list(paper.all), "variants": [name for name in variants.all if name not in paper.all]}
    try:
        rows = of_profile.with_others(variants).with_others(own)
        return rows.only(row for name in names for row in groups.get(name, [name]))
    except ValueError as error:
        raise UserError(f"recipes: {error}") from None


def _tables() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the paper's table, and it with the variants, which start from its rows."""
    paper = read_yaml(TABLE)
    return paper, overlay(paper, read_yaml(VARIANTS))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file that holds a mapping, as DVC reads params.yaml. Raises UserError."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping of sections, found {type(content).__name__}")
    return content


def validated(content: dict[str, Any], path: Path = PARAMS) -> Params:
    """Validate the content of `path`. Raises UserError with file, key and what is wrong."""
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        problems = []
        for detail in error.errors()[:5]:
            key = ".".join(map(str, detail["loc"])) or "(top level)"
            message = detail["msg"].removeprefix("Value error, ")
            if detail["type"] == "extra_forbidden":
                message = f"is now {RENAMED[key]}" if key in RENAMED else "unknown key"
            found = "" if isinstance(detail["input"], dict) else f" (found {detail['input']!r})"
            near = nearest_key([str(part) for part in detail["loc"]]) if message == "unknown key" else None
            problems.append(f"{key}: {message}{found}" + (f", did you mean {near}?" if near else ""))
        raise UserError(f"{path}: {'; '.join(problems)}") from error


def nearest_key(unknown: Sequence[str]) -> str | None:
    """Find the key that was meant by an unknown one: its neighbour by spelling, or its name elsewhere."""
    *sections, name = unknown
    keys = []
    for key in _keys(Params):
        parts = key.split(".")
        # names that users choose, such as a recipe's, are those of the unknown key
        named = [unknown[i] if part == "*" and i < len(unknown) else part for i, part in enumerate(parts)]
        keys.append(named)
    beside = [key[-1] for key in keys if key[:-1] == sections]
    if near := difflib.get_close_matches(name, beside, n=1, cutoff=0.7):
        return ".".join([*sections, *near])
    elsewhere = [".".join(key) for key in keys if key[-1] == name and "*" not in key]
    return elsewhere[0] if len(elsewhere) == 1 else None


def _keys(kind: type[BaseModel], above: str = "") -> Iterator[str]:
    """Yield the dotted keys of a section and all below it; `*` where users choose the names."""
    for name, field in kind.model_fields.items():
        yield f"{above}{name}"
        for section, between in _sections(field.annotation):
            yield from _keys(section, f"{above}{name}.{between}")


def _sections(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the sections that a value of this type holds, each with what stands before its keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
    elif get_origin(annotation) is dict:
        yield from ((section, f"*.{between}") for section, between in _sections(get_args(annotation)[1]))
    else:
        for part in get_args(annotation):
            yield from _sections(part)
