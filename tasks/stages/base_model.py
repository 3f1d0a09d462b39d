"""Stage `base-model`: build one of the embedded models from a seed (student and teacher are in git).

Under DVC only what the pipeline uses is built, and only when nobody has built it of the same settings and
code: neither git, nor a run here or in a worktree beside. By hand (`make base-models`) it is always built.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dgpo_core.config.data import BaseModelsConfig
from dgpo_core.config.params import PARAMS, Params, load_params, read_yaml
from dgpo_core.errors import UserError
from dgpo_core.files import put, write_text
from dgpo_core.temporary import temporary_folder
from dgpo_core.world.pretraining import BaseModelBuilder
from tasks.project.dvc import LOCK, cache_folder, dvc_md5, parse_lock
from tasks.project.files import content_hash
from tasks.project.git import ask
from tasks.project.paths import MODELS
from tasks.stages.stage import stage, stage_main

BUILT = "base-models"  # folder in DVC's cache with built models, by the digest of what decides them


def bring_up_to_date(name: str) -> None:
    """Leave, take over or build `models/<name>`, as DVC runs it. Raises UserError for an unknown name."""
    params, folder = load_params(), MODELS / name
    config = settings(params, name)
    if not in_use(params, name):
        if not folder.is_dir():  # DVC wants something there
            write_text(folder / "README.md", f"Not built: `models` in {PARAMS} name others.\n")
        print(f"{folder}: no model of this run (models in {PARAMS}); left as it is")
        return
    if is_committed(name, config):
        print(f"{folder}: as git has it, for these settings")
        return
    cache = cache_folder()
    kept = cache / BUILT / _digest(config) if cache else None
    if kept and kept.is_dir():
        print(f"{folder}: built before with these settings")
        _copy(kept, folder)
        return
    build(name)
    if kept:
        _copy(folder, kept)


def build(name: str) -> None:
    """Build `models/<name>`, in place of what is there when it is complete."""
    params = load_params()
    base, config = params.base_models, settings(params, name)
    out = MODELS / name
    with stage(f"base-model@{name}", config=config, inputs=[], outputs=[out]) as run:
        total, done = sum(phase.steps for phase in base.models[name].phases), dict[str, int]()

        def report(phase: str, step: int, metrics: dict[str, float]) -> None:
            done[phase] = step
            run.progress(sum(done.values()), total, phase=phase, loss=metrics["loss"])
            run.metrics(step, {f"{phase}/{key}": value for key, value in metrics.items()})

        builder = BaseModelBuilder(base, params.protocol, params.retrieval.top_k, run.state, report)
        builder.build(name, run.output(out))


def settings(params: Params, name: str) -> dict[str, Any]:
    """Return what decides how a model is built; protocol and top k only where it learns expert episodes."""
    base = params.base_models
    if name not in base.models:
        raise UserError(f"{PARAMS}: base_models.models has no {name!r}, only {sorted(base.models)}")
    config: dict[str, Any] = {
        "base_models": base.model_dump(mode="json", exclude={"models"}),
        "model": base.models[name].model_dump(mode="json"),
    }
    if any(phase.kind == "protocol" for phase in base.models[name].phases):
        config |= {"protocol": params.protocol.model_dump(mode="json"), "top_k": params.retrieval.top_k}
    return config


def in_use(params: Params, name: str) -> bool:
    """Return whether the pipeline starts from `models/<name>`."""
    folder = (MODELS / name).resolve()
    return folder in (Path(params.models.student).resolve(), Path(params.models.teacher).resolve())


def is_committed(name: str, config: dict[str, Any]) -> bool:
    """Return whether `models/<name>` is as the commit has it, built with the same settings and code.

    The commit's dvc.lock says what it was built of, unless the pipeline did not use it then.
    """
    lock = ask("show", f"HEAD:./{LOCK}")
    if lock is None:
        return False
    entry = parse_lock(lock).get(f"base-model@{name}")
    if entry is None or entry.outs.get((MODELS / name).as_posix()) != dvc_md5(MODELS / name):
        return False
    used = entry.params.get("models")
    if used is not None and MODELS / name not in map(Path, used.values()):
        return False
    code = {path: entry.deps.get(path) for path in _sources()}
    if any(dvc_md5(Path(path)) != md5 for path, md5 in code.items()):
        return False
    world = BaseModelsConfig.model_fields.keys() - {"models"}
    try:
        base = {key: entry.params[f"base_models.{key}"] for key in world}
        base["models"] = {name: entry.params[f"base_models.models.{name}"]}
        content = {"profile": "", "base_models": base, "protocol": entry.params["protocol"]}
        content["retrieval"] = {"top_k": entry.params["retrieval.top_k"]}
        then = Params.model_validate(content)
    except (KeyError, ValidationError):  # parameters of another version
        return False
    return settings(then, name) == config


def _sources() -> list[str]:
    """Return the code that decides the result, as dvc.yaml names it."""
    sources: list[str] = read_yaml(Path("dvc.yaml"))["stages"]["base-model"]["do"]["deps"]
    return sources


def _digest(config: dict[str, Any]) -> str:
    code = {path: content_hash(Path(path)) for path in _sources()}
    return hashlib.sha256(json.dumps([config, code], sort_keys=True).encode()).hexdigest()


def _copy(source: Path, target: Path) -> None:
    """Copy a folder, in place of what is there; several processes may do so at once."""
    with temporary_folder("base-model", target.parent) as folder:
        put(shutil.copytree(source, folder / target.name), target)


if __name__ == "__main__":
    stage_main("base-model", bring_up_to_date if os.environ.get("DVC_STAGE") else build, "model")
