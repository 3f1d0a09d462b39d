"""The stages of the pipeline and how they depend on each other, as DVC has them."""

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, ValidationError

from dgpo_core.errors import UserError
from tasks.project.dvc import at_work, require_dvc

POOLS = ("cpu", "gpu")


class Meta(BaseModel):
    """The hints to the orchestrator in a stage's `meta:`, which DVC does not hash.

    `pool`: whose worker is to run it. `gpus`: how many slots of the limit `dgpo-gpu` it takes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    timeout_minutes: PositiveFloat | None = None
    retries: NonNegativeInt = 2
    pool: Literal["cpu", "gpu"] = "cpu"
    gpus: NonNegativeInt = 0


class Stage(Meta):
    """One stage. `changed`: DVC would execute it, going by its own inputs and outputs."""

    name: str
    upstream: tuple[str, ...] = ()
    changed: bool = True


def read_dag(root: Path) -> dict[str, Stage]:
    """Return all stages by name, each after its upstream stages.

    Raises UserError for a folder without a valid DVC pipeline or where DVC cannot work, and for a bad `meta`.
    """
    require_dvc(root)
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo, repo.lock:
            graph = repo.index.graph
            found = [_stage(root, node, graph.successors(node)) for node in graph if node.cmd]
    except LockError:
        raise UserError(f"{root}: {at_work(root)}") from None
    except DvcException as error:
        raise UserError(f"{root}: cannot read the pipeline: {' '.join(str(error).split())}") from error
    if not found:
        raise UserError(f"{root}: no stages found (dvc.yaml)")
    stages = {stage.name: stage for stage in found}
    return _with_upstream(stages, stages)


def select(
    stages: Mapping[str, Stage], targets: Iterable[str] = (), from_stage: str | None = None
) -> dict[str, Stage]:
    """Choose only `targets` and what they need, and of these only `from_stage` and what depends on it.

    As with DVC, `distill` stands for all of `distill@...`. Raises UserError for an unknown name, or when
    nothing is left.
    """
    chosen, targets = dict(stages), list(targets)
    if targets:
        chosen = _with_upstream((name for target in targets for name in _members(target, stages)), stages)
    if from_stage:
        after = {name for member in _members(from_stage, stages) for name in downstream(stages, member)}
        chosen = {name: stage for name, stage in chosen.items() if name in after}
    if not chosen:
        raise UserError(f"none of {', '.join(targets)} depends on {from_stage}")
    return chosen


def _members(name: str, stages: Iterable[str]) -> list[str]:
    """Return the stage of this name, or those of the group."""
    found = [stage for stage in stages if stage == name or stage.startswith(f"{name}@")]
    if not found:
        raise UserError(f"no such stage: {name}; there are {', '.join(stages)}")
    return found


def is_stale(stage: Stage, touched: Container[str]) -> bool:
    """Tell whether the stage may have something to do: DVC said so, or one that it needs was `touched`."""
    return stage.changed or any(name in touched for name in stage.upstream)


def downstream(stages: Mapping[str, Stage], name: str) -> set[str]:
    """Return the stage and all that depend on it; `stages` must be in order."""
    found = {name}
    for stage in stages.values():
        if found.intersection(stage.upstream):
            found.add(stage.name)
    return found


def urgency(stages: Mapping[str, Stage]) -> dict[str, tuple[int, int]]:
    """Say of each stage how many wait for it, and how long the longest chain is that ends with it.

    Of the stages that are ready the highest goes first; so RL goes before a distillation that nothing
    follows. `stages` must be in order.
    """
    depth: dict[str, int] = {}
    for name, stage in stages.items():
        depth[name] = 1 + max((depth[other] for other in stage.upstream if other in stages), default=0)
    return {name: (len(downstream(stages, name)), depth[name]) for name in stages}


def _with_upstream(names: Iterable[str], stages: Mapping[str, Stage]) -> dict[str, Stage]:
    ordered: dict[str, Stage] = {}

    def add(name: str) -> None:
        if name not in ordered:
            for upstream in stages[name].upstream:
                add(upstream)
            ordered[name] = stages[name]

    for name in names:
        add(name)
    return ordered


def _address(root: Path, node: Any) -> str:
    """Name the stage as `dvc repro` takes it in `root`; DVC's own name is relative to where we work."""
    folder = Path(node.path).parent.resolve()
    if folder == root.resolve() and node.name:
        return str(node.name)
    file = Path(node.path).resolve().relative_to(root.resolve()).as_posix()
    return f"{file}:{node.name}" if node.name else file


def _stage(root: Path, node: Any, upstream: Iterable[Any]) -> Stage:
    """Make a stage of DVC's node and of its edges, which lead to what it needs; data files do not count."""
    name = _address(root, node)
    try:
        meta = Meta.model_validate(node.meta or {})
    except ValidationError as error:
        found = error.errors()[0]
        key = ".".join(map(str, ("meta", *found["loc"])))
        known = ", ".join(Meta.model_fields)
        raise UserError(
            f"dvc.yaml: stages.{name}.{key}: {found['msg']} (found {found['input']!r}); known: {known}"
        ) from None
    names = tuple(sorted(_address(root, other) for other in upstream if other.cmd))
    return Stage(name=name, upstream=names, changed=bool(node.status()), **meta.model_dump())
