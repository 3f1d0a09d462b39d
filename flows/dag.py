"""The stages of the pipeline and how they depend on each other, as DVC has them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError

DEFAULT_RETRIES = 2
KNOWN_META = {"timeout_minutes", "retries", "pool", "gpus"}


@dataclass(frozen=True)
class Stage:
    """One stage; `meta:` in dvc.yaml carries the hints to the orchestrator, which DVC does not hash."""

    name: str
    upstream: tuple[str, ...]
    timeout_minutes: float | None = None
    retries: int = DEFAULT_RETRIES


def read_dag(root: Path, targets: Iterable[str] | None = None) -> dict[str, Stage]:
    """The stages by name, or only `targets` and what they need, each after its upstream stages.

    Raises UserError for a folder without a valid DVC pipeline, an unknown target or a bad `meta`.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            graph = repo.index.graph
            found = (_stage(root, node, graph.successors(node)) for node in graph if node.cmd)
            stages = {stage.name: stage for stage in found}
    except DvcException as error:
        raise UserError(f"{root}: cannot read the pipeline: {' '.join(str(error).split())}") from error
    if not stages:
        raise UserError(f"{root}: no stages found (dvc.yaml)")
    wanted = list(stages) if not targets else list(targets)
    unknown = sorted(set(wanted) - set(stages))
    if unknown:
        raise UserError(f"no such stage: {', '.join(unknown)}; there are {', '.join(stages)}")
    ordered: dict[str, Stage] = {}
    for name in wanted:
        _add_with_upstream(name, stages, ordered)
    return ordered


def _add_with_upstream(name: str, stages: Mapping[str, Stage], ordered: dict[str, Stage]) -> None:
    if name not in ordered:
        for upstream in stages[name].upstream:
            _add_with_upstream(upstream, stages, ordered)
        ordered[name] = stages[name]


def _address(root: Path, node: Any) -> str:
    """The stage's name as `dvc repro` takes it in `root`; DVC's own is relative to the working directory."""
    folder = Path(node.path).parent.resolve()
    if folder == root.resolve() and node.name:
        return str(node.name)
    file = Path(node.path).resolve().relative_to(root.resolve()).as_posix()
    return f"{file}:{node.name}" if node.name else file


def _stage(root: Path, node: Any, upstream: Iterable[Any]) -> Stage:
    """DVC's edges lead from a stage to what it needs; data files without a command are not our business."""
    name, meta = _address(root, node), node.meta or {}
    if not isinstance(meta, Mapping):
        raise UserError(f"dvc.yaml: stages.{name}.meta must be a mapping")
    unknown = sorted(set(meta) - KNOWN_META)
    if unknown:
        raise UserError(f"dvc.yaml: stages.{name}.meta.{unknown[0]}: unknown; known: {sorted(KNOWN_META)}")
    timeout, retries = meta.get("timeout_minutes"), meta.get("retries", DEFAULT_RETRIES)
    if timeout is not None and not (_is_number(timeout) and timeout > 0):
        raise UserError(f"dvc.yaml: stages.{name}.meta.timeout_minutes must be a positive number")
    if not (_is_number(retries) and retries == int(retries) >= 0):
        raise UserError(f"dvc.yaml: stages.{name}.meta.retries must be a whole number, 0 or more")
    names = tuple(sorted(_address(root, other) for other in upstream if other.cmd))
    return Stage(name, names, timeout, int(retries))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
