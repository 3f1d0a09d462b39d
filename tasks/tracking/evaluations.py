"""Keep evaluations with registered models: DVC's, tied to a model's bytes by dvc.lock, and new ones."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dgpo_core.agent.episode import read_metadata
from dgpo_core.config.params import PARAMS, Params, load_params, read_yaml
from dgpo_core.config.recipes import STUDENT
from dgpo_core.config.retrieval import parse_location
from dgpo_core.config.yaml_text import as_text
from dgpo_core.errors import UserError
from dgpo_core.evaluation.promotion import SETUP, TABLES, Setup, read_setup, unlike_keys
from dgpo_core.evaluation.results import NOTHING
from dgpo_core.evaluation.statistics import Estimate, mean_of_means
from dgpo_core.tables import read_table
from dgpo_core.temporary import temporary_folder
from tasks.project.dvc import Lock, LockedStage, dvc_md5, read_lock, upstream
from tasks.project.files import content_hash
from tasks.project.git import changed_files
from tasks.project.paths import EVALUATION, GIVEN, INDEX, MODELS, QUESTIONS
from tasks.stages.inputs import model_source
from tasks.tracking.lineage import CODE, build, earlier_origin, origin, trained_models
from tasks.tracking.registry import AGAIN, DVC, Registry, Version, store
from tasks.tracking.runs import flatten

BASE = "student"  # beside a version's evaluation: that of the model that training started from
SOURCES = Path(__file__).resolve().parents[2]


def record_evaluations(
    registry: Registry, params: Params, lock: Lock, root: Path = Path(), offered: str | None = None
) -> dict[str, str]:
    """Keep DVC's evaluations with the versions that they are of. Returns {recipe: why not} of the others.

    An evaluation belongs to a version when dvc.lock says that it was made of the version's bytes, and the
    folder is still what dvc.lock says. One that was made with other settings than the kept one counts only
    for the recipe that is `offered`, or when it asked more questions: an experiment changes no figures.
    """
    problems = {}
    for recipe, stage in trained_models(params, lock, root).items():
        version = registry.with_tag("dvc_md5", lock[stage].outs[(MODELS / recipe).as_posix()])
        if version is None:
            cure = "run `dgpo register` (--challenger offers it, too)"
            problems[recipe] = f"{MODELS / recipe} is not registered; {cure}"
            continue
        with temporary_folder("evidence") as folder:
            if not _assemble(recipe, version.hash, lock, folder, root):
                cure = f"run `dvc repro evaluate@{recipe}`"
                problems[recipe] = f"{EVALUATION / recipe} is not of this model; {cure}"
            elif recipe == offered or _may_replace(registry, version, folder):
                _assemble(STUDENT, _student_hash(params, root), lock, folder / BASE, root)
                registry.store_evaluation(version, folder, _average(folder / TABLES[0]), DVC)
    return problems


def own_version(registry: Registry, params: Params, lock: Lock, root: Path = Path()) -> Version:
    """Return the version that is the model of `promote.recipe` in `root`. Raises UserError for none."""
    recipe = params.challenger
    stage = trained_models(params, lock, root).get(recipe) if recipe else None
    version = stage and registry.with_tag("dvc_md5", lock[stage].outs[f"{MODELS}/{recipe}"])
    if not version:
        raise UserError(
            f"no version is this working tree's model of {recipe or 'a compared recipe'}: train it "
            "(`dvc repro`), or bring it back (`dvc checkout`), then `dgpo register`"
        )
    return version


def offer(registry: Registry, params: Params, lock: Lock, root: Path = Path()) -> Version:
    """Make the model of `promote.recipe` in the working tree `root` the challenger, with its evaluation.

    Raises UserError for one that has no version or no evaluation, that was asked too few questions to be
    judged, or that was made with parameters that no commit has.
    """
    version = own_version(registry, params, lock, root)
    recipe = version.tags["recipe"]
    if changed_files(PARAMS, root=root, untracked=True):
        raise UserError(f"{version.name} cannot be offered: {PARAMS} has changes that no commit has")
    if other := _other_parameters(recipe, lock, root):
        raise UserError(
            f"{version.name} cannot be offered: it was made with other parameters than those of {PARAMS}: "
            f"{', '.join(other)}; run `dvc repro`"
        )
    table, minimum = root / EVALUATION / recipe / TABLES[0], params.promote.min_questions
    asked = Counter(read_table(table, ["dataset"])["dataset"].to_pylist() if table.is_file() else ())
    if few := [f"{name} {asked[name]}" for name in params.questions.test if asked[name] < minimum]:
        raise UserError(
            f"{version.name} cannot be offered: it was asked fewer than promote.min_questions ({minimum}) "
            f"questions ({', '.join(few)}); raise evaluate.questions and run `dvc repro report`"
        )
    problems = record_evaluations(registry, params, lock, root, offered=recipe)
    if recipe in problems:
        raise UserError(f"{version.name} cannot be offered: {problems[recipe]}")
    registry.make_challenger(version)
    return registry.version(version.number)


def register_trained(challenger: bool = False) -> None:
    """Register the models of this working tree that have no version yet: trained before, or without a store.

    With `challenger` the model of `promote.recipe` is offered too. Raises UserError when there is no model,
    for parameters that this version of the code does not know, and for a model that cannot be offered.
    """
    now = origin()
    if now is None or not (trained := trained_models(now.params, now.lock)):
        raise UserError(f"{MODELS}: no trained model is what dvc.lock says; run `dvc repro`")
    with store() as registry:
        for recipe, stage in trained.items():
            folder, start = MODELS / recipe, earlier_origin(stage, now)
            inputs = [path for path in now.lock[stage].deps if not path.startswith(CODE)]
            hashes = {path: content_hash(Path(path)) for path in inputs if Path(path).exists()}
            made = build(recipe, start, hashes, folder)
            known = registry.with_tag("hash", made["hash"])
            run_id = known.run_id if known else registry.new_run(f"register {recipe}")
            version = registry.register(made, folder, run_id, start.params.promote.log_weights)
            print(f"{folder}: {version.reference}{' (known)' if known else ''}")
        if challenger:
            print(f"challenger: {offer(registry, now.params, now.lock).name}")
        else:
            record_evaluations(registry, now.params, now.lock)


def evaluate_again(reference: str) -> None:
    """Evaluate a registered model with the questions, the index and the settings of this working tree.

    The result is kept with the version and is no output of DVC's. Raises UserError.
    """
    params = load_params()
    with store() as registry:
        version = registry.named(reference)
        recipe, folder = version.tags["recipe"], registry.folder(version).resolve()
        with temporary_folder("evaluate") as project:
            _project(project, params, recipe, folder)
            command = [sys.executable, "-m", "tasks.stages.evaluate", recipe]
            if code := subprocess.run(command, cwd=project, env=_environment(), check=False).returncode:
                raise UserError(f"{version.name} was not evaluated: the stage ended with exit code {code}")
            evidence = project / "evidence"
            index = read_metadata(project / EVALUATION / recipe / "episodes.parquet")["index"]
            settings = _settings(LockedStage("", {}, {}, params.model_dump(mode="json")))
            made = Setup(version.hash, index, settings, _code())
            _copy(project / EVALUATION / recipe, evidence, made)
            _assemble(STUDENT, _student_hash(params, Path()), read_lock(), evidence / BASE, Path())
            registry.store_evaluation(version, evidence, _average(evidence / TABLES[0]), AGAIN)
    print(f"{version.name}: evaluated, and kept with the version")


def _may_replace(registry: Registry, version: Version, folder: Path) -> bool:
    """Decide whether the evaluation in `folder` may count instead of the kept one: with the same settings, or
    with more questions and otherwise the same."""
    try:
        with registry.evaluation(version) as kept:
            other = unlike_keys(read_setup(folder).settings, read_setup(kept).settings)
            ours, theirs = (pq.read_metadata(each / TABLES[0]).num_rows for each in (folder, kept))
    except (UserError, OSError, ValueError):
        return True  # there is none, or it is gone
    return not other or (other == ["evaluate.questions"] and ours > theirs)


def _other_parameters(recipe: str, lock: Lock, root: Path) -> list[str]:
    """Return the keys that training or evaluation had other values of than params.yaml has now."""
    evaluation = lock.get(f"evaluate@{recipe}")
    paths = [(MODELS / recipe).as_posix(), *(evaluation.deps if evaluation else ())]
    made = [*upstream(lock, paths).values(), *([evaluation] if evaluation else [])]
    now = LockedStage("", {}, {}, read_yaml(root / PARAMS))
    found = set()
    for key, value in ((key, value) for stage in made for key, value in stage.params.items()):
        try:
            if now.param(key) != value:
                found.add(key)
        except (KeyError, TypeError):
            found.add(key)
    return sorted(found)


def _student_hash(params: Params, root: Path) -> str:
    """Return what identifies the model that training starts from: its folder's hash, or its hub name."""
    base = model_source(params, STUDENT)
    return content_hash(root / base) if (root / base).is_dir() else base


def _assemble(model: str, digest: str, lock: Lock, folder: Path, root: Path) -> bool:
    """Copy DVC's evaluation of `model` to `folder`, with its origin; False unless it is of these bytes."""
    stage = lock.get(f"evaluate@{model}")
    source, path = EVALUATION / model, (GIVEN if model == STUDENT else MODELS) / model
    if stage is None or stage.outs.get(source.as_posix()) != dvc_md5(root / source):
        return False
    watched = stage.deps.get(path.as_posix())
    if watched and watched != dvc_md5(root / path):
        return False
    code = {path: md5 for path, md5 in stage.deps.items() if path.startswith(CODE)}
    index = read_metadata(root / source / "episodes.parquet")["index"]
    _copy(root / source, folder, Setup(digest, index, _settings(stage), code))
    return True


def _copy(evaluation: Path, folder: Path, made: Setup) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        shutil.copyfile(evaluation / name, folder / name)
    (folder / SETUP).write_text(made.as_json(), encoding="utf-8")


def _average(path: Path) -> Estimate:
    """Average EM over the data sets, of the questions that did not fail."""
    table = read_table(path, ["dataset", "em", "outcome"]).to_pandas()
    answered = table[table["outcome"] != "failed"]
    strata = [own.to_numpy(float) for _, own in answered.groupby("dataset")["em"]]
    return mean_of_means(strata) if strata else NOTHING


def _settings(stage: LockedStage) -> dict[str, Any]:
    """Return what an evaluation's figures depend on, by dotted key."""
    own = ("evaluate.sampling", "evaluate.seed", "evaluate.questions")
    keys = (*own, "protocol", "retrieval.top_k", "questions.test")
    return dict(flatten({key: stage.param(key) for key in keys}))


def _code() -> dict[str, str]:
    """Return DVC's hash of each source that the stage depends on."""
    stages = read_yaml(SOURCES / "dvc.yaml")["stages"]
    paths = [path for path in stages["evaluate"]["do"]["deps"] if path.startswith(CODE)]
    return {path: dvc_md5(SOURCES / path) or "" for path in paths}


def _project(project: Path, params: Params, recipe: str, folder: Path) -> None:
    """Make a working directory for the stage `evaluate`, in which the version is the model of its recipe.

    Folders that we name relative to ours are named absolutely there.
    """
    content = params.model_dump(mode="json")
    content["recipes"] = {"distill": {recipe: {"start": STUDENT, "objective": "ce"}}}  # a row only names it
    content |= {"compare": [recipe], "promote": {}}
    location = parse_location(params.retrieval.location)
    if location.kind in ("folder", "replay"):  # filled already
        kind = "embedded" if location.kind == "folder" else "replay"
        content["retrieval"]["location"] = f"{kind}:{Path(location.address).resolve()}"
    (project / PARAMS).write_text(as_text(content), encoding="utf-8")
    _lend_index(project / INDEX)
    (project / QUESTIONS).symlink_to(QUESTIONS.resolve())
    (project / MODELS).mkdir()
    (project / MODELS / recipe).symlink_to(folder)


def _lend_index(folder: Path) -> None:
    """Link our shards, with a manifest by which the encoder is found from any working directory."""
    from dgpo_core.retrieval.shards import read_manifest, write_manifest  # imports torch

    manifest = read_manifest(INDEX)
    if (model := Path(str(manifest.encoder.get("model")))).is_dir():
        manifest = replace(manifest, encoder=manifest.encoder | {"model": str(model.resolve())})
    write_manifest(folder, manifest)
    for shard in manifest.shards:
        (folder / shard).symlink_to((INDEX / shard).resolve())


def _environment() -> dict[str, str]:
    """Return our environment without the store that our runs go to and the pipeline that they belong to."""
    left = {"MLFLOW_TRACKING_URI", "DGPO_PIPELINE_RUN", "DVC_STAGE"}
    return {key: value for key, value in os.environ.items() if key not in left} | {"PYTHONPATH": str(SOURCES)}
