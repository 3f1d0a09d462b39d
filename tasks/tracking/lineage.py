"""Where runs and trained models come from, in words that can be compared: commit, settings, dvc.lock.

Tags say it of every run. A trained model has a lineage, a JSON artifact of its version: it is built from what
was true when training began (`Origin`), never from what is checked out when it is read. Knows no MLflow.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dgpo_core.config.endpoint import endpoint_of
from dgpo_core.config.params import PARAMS, Params, load_params, paper_recipes, resolve_profile
from dgpo_core.config.recipes import Distillation, Keep
from dgpo_core.config.yaml_text import as_text
from dgpo_core.errors import UserError
from dgpo_core.hub import cached_file
from tasks.project.dvc import LOCK, Lock, LockedStage, dvc_md5, read_lock, upstream
from tasks.project.files import content_hash
from tasks.project.git import changed_files, head
from tasks.project.paths import CORPUS, INDEX, METRICS, MODELS

PROFILES = Path("profiles")
# Recorded in every run anyway, and written while it lasts (`dvc.lock` by DVC, `params.yaml` by `dgpo use`).
RECORDED = (LOCK, PARAMS)
NAMED = {"distill": "recipe", "reinforce": "recipe", "evaluate": "model", "base-model": "model"}


def locked_outputs(root: Path = Path()) -> dict[str, dict[str, str]]:
    """Return stage -> path -> DVC's md5; empty without a dvc.lock that can be read: tracking goes on."""
    with suppress(OSError, UserError):
        return {name: stage.outs for name, stage in read_lock(root).items()}
    return {}


def lock_digest(root: Path = Path()) -> str | None:
    """Compute the SHA-256 of dvc.lock."""
    with suppress(OSError):
        return hashlib.sha256((root / LOCK).read_bytes()).hexdigest()
    return None


def labels(root: Path = Path()) -> dict[str, str]:
    """Return tags of every run, as far as known: commit, whether it is all of the code, profile, seed."""
    found = {"git.commit": commit} if (commit := head(root)) else {}
    if (changed := changed_files(".", *(f":(exclude){path}" for path in RECORDED), root=root)) is not None:
        found["git.dirty"] = str(bool(changed)).lower()
    if params := settings(root):
        found |= {"profile": params.profile, "seed": str(params.seed)}
    return found


def stage_labels(stage: str) -> dict[str, str]:
    """Name what stands after `@`: `distill@kd` -> {"recipe": "kd"}, `evaluate@kd` -> {"model": "kd"}."""
    kind, _, item = stage.partition("@")
    return {NAMED[kind]: item} if item and kind in NAMED else {}


def settings(root: Path = Path()) -> Params | None:
    """Read params.yaml; None where it is missing or invalid, which the stage that reads it will say."""
    with suppress(UserError):
        return load_params(root / PARAMS)
    return None


def changed_settings(params: Params, root: Path = Path()) -> dict[str, Any]:
    """Find the sections of params.yaml that somebody edited: what differs from its profile, nested as there.

    Which of the known recipes were chosen is no difference; a row of one's own is one.
    Empty for a profile that there is not.
    """
    with suppress(UserError):
        rows = params.recipes.all.keys() & paper_recipes(["all", "variants"]).all.keys()
        path = root / PROFILES / f"{params.profile}.yaml"
        profile = resolve_profile(path, sorted(rows) or None)
        return _difference(params.model_dump(mode="json", exclude={"compare"}), profile)
    return {}


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in ours.items():
        other = theirs.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            if inner := _difference(value, other):
                changed[key] = inner
        elif value != other:
            changed[key] = value
    return changed


SCHEMA = 1
# What the commit must contain for the model to be made again; the parameters are written down.
SOURCES = ("dgpo_core", "tasks", "dvc.yaml", "models", ":(exclude)models/given")  # links: params say it too
CODE = ("dgpo_core/", "tasks/")
Lineage = dict[str, Any]


@dataclass(frozen=True)
class Code:
    """The commit (empty outside git), and the sources that were not as committed."""

    commit: str
    dirty: list[str]


@dataclass(frozen=True)
class Origin:
    """What a training starts from; the files may change while it runs."""

    code: Code
    params: Params
    lock: dict[str, LockedStage]


def origin() -> Origin | None:
    """Return what a training that starts now starts from; None where parameters or lock cannot be read."""
    with suppress(UserError):
        return Origin(code(), load_params(), read_lock())
    return None


def earlier_origin(stage: str, now: Origin) -> Origin:
    """Rebuild what an ended training started from: its parameters are in dvc.lock.

    Raises UserError for parameters that this version does not know.
    """
    made = [*upstream(now.lock, now.lock[stage].deps).values(), now.lock[stage]]
    params = now.params.model_dump(mode="json")
    for key, value in ((key, value) for each in made for key, value in each.params.items()):
        *sections, last = key.split(".")
        place = params
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    deps = {path: md5 for each in made for path, md5 in each.deps.items() if path.startswith(CODE)}
    other = [path for path, md5 in deps.items() if dvc_md5(Path(path)) != md5]
    try:
        then = Params.model_validate(params)
    except ValidationError as error:
        problem = " ".join(str(error.errors()[0]["msg"]).split())
        raise UserError(
            f"{stage}: trained with parameters of another version ({problem}); train it again"
        ) from None
    return Origin(Code("", other) if other else now.code, then, now.lock)


def code(root: Path = Path()) -> Code:
    """Return the commit that is checked out, and the sources that differ from it."""
    return Code(head(root), changed_files(*SOURCES, root=root, untracked=True) or [])


def build(recipe: str, start: Origin, inputs: Mapping[str, str], folder: Path) -> Lineage:
    """Describe the model in `folder`, trained from `start` on `inputs` (path -> SHA-256).

    Raises UserError when the folder is missing.
    """
    params, stages = start.params, upstream(start.lock, inputs)
    locked = {path: md5 for stage in stages.values() for path, md5 in stage.outs.items()}
    name, corpus = _stage(recipe, params), CORPUS.as_posix()
    made = {
        "cmd": f"exec python -m tasks.stages.{name.replace('@', ' ')}",
        "outs": {folder.as_posix(): dvc_md5(folder)},
    }
    return {
        "schema": SCHEMA,
        "recipe": recipe,
        "stage": name,
        "profile": params.profile,
        "seed": params.seed,
        "hash": content_hash(folder),
        "dvc_md5": dvc_md5(folder),
        "code": {"commit": start.code.commit, "dirty": start.code.dirty},
        "corpus": {"path": corpus, "md5": locked.get(corpus)},
        "index": _index(inputs, locked),
        "student": _model(params.models.student, inputs),
        "teacher": _model(params.models.teacher, inputs),
        "recipes": {row: params.recipes.all[row].model_dump() for row in _chain(recipe, params)},
        "filter": _filter(recipe, params, locked),
        "changed": {key: list(pair) for key, pair in changed_parameters(params)},
        "params": params.model_dump(mode="json"),
        "stages": {key: {"cmd": stage.cmd, "outs": stage.outs} for key, stage in stages.items()}
        | {name: made},
        # read by a stage that was started by hand: not what dvc.lock says of it
        "unlocked": [path for path in inputs if path in locked and dvc_md5(Path(path)) != locked[path]],
    }


def changed_parameters(params: Params) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Give (dotted key, (default, value)) of every parameter that differs from its default."""
    default = flat(Params(profile=params.profile).model_dump(mode="json"))
    own = flat(params.model_dump(mode="json"))
    for key in sorted(default | own):
        if default.get(key) != own.get(key):
            yield key, (default.get(key), own.get(key))


def differences(lineage: Lineage, root: Path = Path()) -> list[str]:
    """Say how this checkout differs from what the model was made of."""
    found, now = [], code(root)
    if now.commit != lineage["code"]["commit"]:
        found.append(f"code: commit {now.commit[:12] or 'none'} is checked out")
    if now.dirty:
        found.append(f"code: changed here: {', '.join(now.dirty)}")
    with suppress(UserError):
        here = flat(load_params(root / PARAMS).model_dump(mode="json"))
        stored = flat(lineage["params"])
        keys = sorted(key for key in here | stored if here.get(key) != stored.get(key))
        found += [f"parameters: {key} is {here.get(key)!r} here, was {stored.get(key)!r}" for key in keys]
    lock = read_lock(root)
    for name, stage in lineage["stages"].items():
        outs = lock[name].outs if name in lock else {}
        found += [
            f"{name}: {path} is {outs.get(path, 'not made')} in dvc.lock, was {md5}"
            for path, md5 in stage["outs"].items()
            if outs.get(path) != md5
        ]
    return found


def commands(lineage: Lineage, reference: str) -> list[str]:
    """List the commands that make the model again in a fresh working tree; none without its sources."""
    if not lineage["code"]["commit"] or lineage["code"]["dirty"]:
        return []
    return [
        f"git worktree add --detach ../recreated {lineage['code']['commit']}",
        f"dgpo lineage {reference} --params > ../recreated/{PARAMS}",
        f"cd ../recreated && dvc repro {lineage['stage']}",
    ]


def parameters(lineage: Lineage) -> str:
    """Return the params.yaml of the training."""
    return as_text(lineage["params"])


def text(lineage: Lineage, reference: str, differing: Sequence[str]) -> str:
    """Describe a lineage for people."""
    made, index = lineage["code"], lineage["index"]
    dirty = f", with other sources in {', '.join(made['dirty'])}" if made["dirty"] else ""
    kept = lineage["filter"]
    lines = [
        f"{reference}: recipe {lineage['recipe']}, profile {lineage['profile']}, seed {lineage['seed']}",
        f"model     sha256 {lineage['hash']}, DVC {lineage['dvc_md5']}",
        f"code      {made['commit'] or 'no commit'}{dirty}",
        f"corpus    {lineage['corpus']['path']}, md5 {lineage['corpus']['md5']}",
        f"index     digest {index['digest']}, {index['passages']} passages, DVC {index['md5']}",
        f"student   {_source(lineage['student'])}",
        f"teacher   {_source(lineage['teacher'])}",
        f"filter    {kept['rule']}: {_share(kept)}",
        f"recipes   {' <- '.join(_row(name, row) for name, row in lineage['recipes'].items())}",
        "parameters that differ from the defaults:",
        *(f"  {key}: {new!r} (default {old!r})" for key, (old, new) in lineage["changed"].items()),
        "outputs of the stages (DVC's md5):",
        *(
            f"  {name}: {path} {md5}"
            for name, s in lineage["stages"].items()
            for path, md5 in s["outs"].items()
        ),
    ]
    if lineage["unlocked"]:
        lines.append(f"not what dvc.lock said of it: {', '.join(lineage['unlocked'])}")
    steps = commands(lineage, reference)
    lines += ["made again by:", *(f"  {step}" for step in steps or ["nothing: no commit has its sources"])]
    lines.append("this checkout differs:" if differing else "this checkout has the same code and parameters")
    return "\n".join([*lines, *(f"  {line}" for line in differing)])


def _stage(recipe: str, params: Params) -> str:
    return f"{'distill' if recipe in params.recipes.distill else 'reinforce'}@{recipe}"


def _chain(recipe: str, params: Params) -> Iterator[str]:
    """Give the recipe and those that it starts from."""
    while recipe in params.recipes.all:
        yield recipe
        recipe = params.recipes.all[recipe].start


def _index(inputs: Mapping[str, str], locked: Mapping[str, str]) -> dict[str, Any]:
    from dgpo_core.retrieval.shards import read_manifest  # imports torch; every stage imports this

    path = INDEX.as_posix()
    found: dict[str, Any] = {"path": path, "sha256": inputs.get(path), "md5": locked.get(path)}
    found |= {"digest": None, "passages": None}
    with suppress(UserError):
        manifest = read_manifest(INDEX)
        found |= {"digest": manifest.digest, "passages": manifest.passages}
    return found


def _model(source: str, inputs: Mapping[str, str]) -> dict[str, str | None]:
    """Identify a given model: by its folder's hashes, or by the hub's revision that this machine has."""
    if Path(source).is_dir():
        md5, sha256 = dvc_md5(Path(source)), inputs.get(source) or content_hash(Path(source))
        return {"source": source, "sha256": sha256, "md5": md5, "revision": None}
    on_hub = endpoint_of(source) is None  # of a model behind an endpoint its name is all that is known
    cached = cached_file(source, "config.json") if on_hub else None
    revision = cached.parent.name if cached else None
    return {"source": source, "sha256": None, "md5": None, "revision": revision}


RULES: dict[Keep, str] = {
    "all": "all episodes",
    "correct": "correct episodes only",
    "searched": "correct episodes with a search",
    "evidence": "correct episodes with evidence",
}


def _filter(recipe: str, params: Params, locked: Mapping[str, str]) -> dict[str, Any]:
    """Say which teacher episodes the distillations of the chain trained on, and the share that was kept."""
    rows = [params.recipes.all[name] for name in _chain(recipe, params)]
    on_teacher = [row for row in rows if isinstance(row, Distillation) and row.episodes != "student"]
    rule = " and ".join(sorted({RULES[row.keep] for row in on_teacher})) or "no teacher episodes"
    path = METRICS / "filter.json"
    md5 = locked.get(path.as_posix())
    if not on_teacher or md5 is None or md5 != dvc_md5(path):
        return {"rule": rule, "kept": None, "of": None}
    counts = json.loads(path.read_text(encoding="utf-8"))
    return {"rule": rule, "kept": counts["kept"], "of": counts["raw"]}


def _share(kept: Mapping[str, Any]) -> str:
    if not kept["of"]:
        return "not recorded"
    return f"{kept['kept']} of {kept['of']} teacher episodes are correct ({kept['kept'] / kept['of']:.1%})"


def _row(name: str, row: Mapping[str, Any]) -> str:
    return f"{name} ({', '.join(f'{key} {value}' for key, value in row.items())})"


def _source(model: Mapping[str, Any]) -> str:
    if model["sha256"]:
        return f"{model['source']}, sha256 {model['sha256']}, DVC {model['md5']}"
    return f"{model['source']}, revision {model['revision'] or 'unknown'}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join nested keys by dots: {"a": {"b": 1}} -> {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return leaves


def trained_models(params: Params, lock: Lock, root: Path = Path()) -> dict[str, str]:
    """Return {recipe: stage} of the recipes whose model in the working tree `root` is the one of dvc.lock."""
    found = {}
    for recipe in params.recipes.all:
        stage, path = _stage(recipe, params), (MODELS / recipe).as_posix()
        if stage in lock and path in lock[stage].outs and lock[stage].outs[path] == dvc_md5(root / path):
            found[recipe] = stage
    return found
