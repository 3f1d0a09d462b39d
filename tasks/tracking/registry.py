"""The registered model `search-agent` in MLflow: versions, evaluations, and aliases that people trust.

Every trained model is a version; what belongs to it are artifacts of the run that trained it:

    models/search-agent/        pointer.json; with `promote.log_weights` an MLflow model, for all who have
                                MLflow and transformers; its `model/` is the trained folder byte for byte
    promotion/lineage.json      see tasks/tracking/lineage.py
    promotion/<digest>/         an evaluation (and the student's, in `student/`)
    promotion/decisions/        every decision about the version, see dgpo_core/evaluation/promotion.py

Aliases: `challenger` (the model that was offered last), `champion`, `previous`. mlflow and torch are imported
where they are used, because every stage imports this file.
"""

import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dgpo_core.errors import InfrastructureError, UserError, without_credentials
from dgpo_core.temporary import temporary_folder
from tasks.project.dvc import from_cache
from tasks.project.files import content_hash
from tasks.tracking import lineage
from tasks.tracking.pages import MODEL_NOTE
from tasks.tracking.runs import connect, start_run
from tasks.tracking.store import explained, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from dgpo_core.evaluation.promotion import Decision
    from dgpo_core.evaluation.statistics import Estimate


def save_mlflow_model(folder: Path, saved: Path) -> None:
    """Save an MLflow model of the transformers flavour; `saved/model` is the folder byte for byte."""
    import mlflow.transformers
    import torch
    import transformers
    from huggingface_hub import ModelCard

    from dgpo_core.models import load_model, load_tokenizer

    source = str(folder.resolve())
    pipeline = transformers.pipeline(
        "text-generation", model=load_model(source), tokenizer=load_tokenizer(source)
    )
    logging.getLogger("mlflow.transformers").setLevel(logging.ERROR)  # it misses a licence on the hub
    mlflow.transformers.save_model(
        pipeline,
        saved,
        # given, because they would be looked for on the hub, and by importing everything in a new process
        model_card=ModelCard(f"---\nlibrary_name: transformers\n---\n\n# {NAME}\n"),
        pip_requirements=[
            f"torch=={torch.__version__.partition('+')[0]}",
            f"transformers=={transformers.__version__}",
        ],
    )
    shutil.rmtree(saved / "model")
    shutil.copytree(folder, saved / "model")


NAME = "search-agent"
CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
MODEL, PROMOTION = f"models/{NAME}", "promotion"  # places among a run's artifacts
LINEAGE = f"{PROMOTION}/lineage.json"
DVC, AGAIN = "dvc", "dgpo evaluate"  # who evaluated a version
WEIGHTS_PATIENCE = 900.0  # seconds that a stage waits for its weights to arrive
FETCHED = Path(".state/models")  # weights that were brought here, by hash
Job = Callable[["MlflowClient", str], None]


@dataclass(frozen=True)
class Version:
    """One version of the registered model."""

    number: str
    run_id: str
    tags: Mapping[str, str]

    @property
    def name(self) -> str:
        """Return the name for people: `version 3 (dgpo)`."""
        return f"version {self.number} ({self.tags.get('recipe', '?')})"

    @property
    def reference(self) -> str:
        return f"models:/{NAME}/{self.number}"

    @property
    def hash(self) -> str:
        """Return the SHA-256 of the model's folder."""
        return self.tags["hash"]


def registration(recipe: str, start: lineage.Origin, inputs: Mapping[str, str], folder: Path) -> Job:
    """Make the job by which a training stage's model becomes a version of the registered model."""

    def job(client: "MlflowClient", run_id: str) -> None:
        made = lineage.build(recipe, start, inputs, folder)
        Registry(client).register(made, folder, run_id, start.params.promote.log_weights)

    return job


class Registry:
    """The registered model in the store that MLFLOW_TRACKING_URI names. Methods raise what MLflow raises."""

    def __init__(self, client: "MlflowClient") -> None:
        self._client = client

    def register(self, made: lineage.Lineage, folder: Path, run_id: str, log_weights: bool) -> Version:
        """Return the version of the bytes in `folder`: a new one, with run `run_id`, or the known one."""
        version = self.with_tag("hash", made["hash"]) or self._create(made, folder, run_id)
        self._client.set_tag(run_id, "model_version", version.reference)
        if log_weights and version.tags["weights"] != "artifact":
            self._log_weights(version, folder)
        return self.version(version.number)

    def version(self, number: str) -> Version:
        """Return the version with this number. Raise UserError when there is none."""
        from mlflow.exceptions import MlflowException

        try:
            return _version(self._client.get_model_version(NAME, number))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        known = ", ".join(version.number for version in self.versions()) or "none"
        raise UserError(f"{NAME} has no version {number}; there are: {known}")

    def versions(self) -> list[Version]:
        """List all versions, the oldest first."""
        found = [_version(found) for found in self._client.search_model_versions(f"name='{NAME}'")]
        return sorted(found, key=lambda version: int(version.number))

    def with_tag(self, key: str, value: str) -> Version | None:
        """Find the newest version whose tag `key` is `value`."""
        return next((v for v in reversed(self.versions()) if v.tags.get(key) == value), None)

    def alias(self, alias: str) -> Version | None:
        """Find the version that has the alias."""
        from mlflow.exceptions import MlflowException

        try:
            return _version(self._client.get_model_version_by_alias(NAME, alias))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def named(self, reference: str) -> Version:
        """Find the version of `models:/search-agent@champion`, `.../3` or a recipe's newest one.

        Raises UserError.
        """
        if match := re.fullmatch(rf"models:/{NAME}(?:@(\w+)|/(\d+))", reference):
            alias, number = match.groups()
            if number:
                return self.version(number)
            if alias in (CHAMPION, CHALLENGER, PREVIOUS) and (version := self.alias(alias)):
                return version
            raise UserError(f"{reference}: no version has this alias; `dgpo promote` makes a champion")
        if version := self.with_tag("recipe", reference):
            return version
        recipes = ", ".join(sorted({v.tags.get("recipe", "?") for v in self.versions()})) or "none"
        raise UserError(
            f"{reference}: expected models:/{NAME}@champion, models:/{NAME}/<version> or a recipe with a "
            f"version; there are: {recipes}"
        )

    def make_challenger(self, version: Version) -> None:
        self._client.set_registered_model_alias(NAME, CHALLENGER, version.number)

    def make_champion(self, version: Version, expected: Version | None, previous: Version | None) -> None:
        """Move the alias: the only place where this happens.

        `expected` is the champion on which the decision rests. The alias is read again right before it is
        set; MLflow has no compare-and-set, so of two moves within that moment both succeed, and the later one
        holds. Raises UserError when the champion has changed.
        """
        now = self.alias(CHAMPION)
        if (now and now.number) != (expected and expected.number):
            raise UserError(
                f"{NAME}: the champion changed meanwhile (now {now.name if now else 'none'}); decide again"
            )
        if previous:
            self._client.set_registered_model_alias(NAME, PREVIOUS, previous.number)
        elif now:
            self._client.delete_registered_model_alias(NAME, PREVIOUS)
        self._client.set_registered_model_alias(NAME, CHAMPION, version.number)

    def tag(self, version: Version, **tags: str) -> None:
        for key, value in tags.items():
            self._client.set_model_version_tag(NAME, version.number, key, value)

    def store_evaluation(self, version: Version, folder: Path, average: "Estimate", source: str) -> None:
        """Keep an evaluation with the version, and let it count; `source` is DVC or AGAIN.

        One that was made again gives way only to an evaluation of DVC's that is newer than it.
        """
        place = f"{PROMOTION}/{content_hash(folder)[:16]}"
        known = any(each.path == place for each in self._client.list_artifacts(version.run_id, PROMOTION))
        if known and source == DVC and version.tags.get("evaluated_by") == AGAIN:
            return
        if not known:
            self._client.log_artifacts(version.run_id, str(folder), place)
        # last: only what has arrived counts
        self.tag(version, em=f"{average.mean:.6f}", evaluation=place, evaluated_by=source)
        named = self._client.get_model_version(NAME, version.number).description or version.name
        interval = "" if math.isnan(average.low) else f" [{average.low:.3f}, {average.high:.3f}]"
        described = f"{named.partition(': EM ')[0]}: EM {average.mean:.3f}{interval}"
        self._client.update_model_version(NAME, version.number, described)

    def store_decision(self, version: Version, decision: "Decision") -> None:
        """Keep a decision with the version: JSON and Markdown as artifacts, the verdict as tags."""
        from dgpo_core.evaluation.promotion import markdown

        now = datetime.now(UTC).isoformat(timespec="seconds")
        place = f"{PROMOTION}/decisions/{now.replace(':', '')}"
        text = json.dumps({**decision.as_dict(), "decided": now}, indent=2) + "\n"
        self._client.log_text(version.run_id, text, f"{place}/decision.json")
        self._client.log_text(version.run_id, markdown(decision), f"{place}/decision.md")
        gain = decision.gain
        shown = f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})" if gain else "not measured"
        self.tag(version, decided=now, decision=decision.verdict, gain=shown, decision_artifact=place)

    @contextmanager
    def evaluation(self, version: Version) -> Iterator[Path]:
        """Give the version's evaluation in a temporary folder. Raise UserError when it has none."""
        place = version.tags.get("evaluation")
        if not place:
            raise UserError(
                f"{version.name} was never evaluated: run `dvc repro report`, or `dgpo evaluate "
                f"{version.reference}` if its recipe is not compared"
            )
        with temporary_folder("evidence") as folder:
            yield self._download(version, place, folder, f"`dgpo evaluate {version.reference}`")

    def lineage_of(self, version: Version) -> lineage.Lineage:
        """Return the lineage as it was written when the version was registered."""
        with temporary_folder("lineage") as folder:
            cure = "delete the version on MLflow's page of the model, then `dgpo register`"
            path = self._download(version, LINEAGE, folder, cure)
            stored: lineage.Lineage = json.loads(path.read_text(encoding="utf-8"))
        return stored

    def folder(self, version: Version) -> Path:
        """Find the version's folder with weights: as an artifact, in the working tree, or in DVC's cache.

        What is returned has the version's hash. Raises UserError that says where to look for the weights.
        """
        workspace, fetched = Path(version.tags["folder"]), FETCHED / version.hash
        for path in (workspace, fetched):
            if path.is_dir() and content_hash(path) == version.hash:
                return path
        if version.tags["weights"] == "artifact" and (logged := self._artifact(version, fetched)):
            return logged
        fetched.parent.mkdir(parents=True, exist_ok=True)
        if from_cache(version.tags["dvc_md5"], fetched) and content_hash(fetched) == version.hash:
            return fetched
        raise UserError(
            f"{version.name}: its weights are not here: neither in MLflow, nor in {workspace}, nor in DVC's "
            f"cache (md5 {version.tags['dvc_md5']}); fetch them into the cache, or make them again "
            f"(`dgpo lineage {version.reference}` says how)"
        )

    def new_run(self, name: str) -> str:
        """Make an ended run, for what is registered outside of a stage."""
        run_id = start_run(self._client, name, {"kind": "register"})
        self._client.set_terminated(run_id)
        return run_id

    def _download(self, version: Version, place: str, folder: Path, cure: str) -> Path:
        """Download an artifact of the version's run to `folder`. Raise UserError when it is gone."""
        from mlflow.exceptions import MlflowException

        where = self._client.get_run(version.run_id).info.artifact_uri
        try:
            return Path(self._client.download_artifacts(version.run_id, place, str(folder)))
        except (MlflowException, OSError) as error:
            if isinstance(error, MlflowException) and error.error_code == "PERMISSION_DENIED":
                raise
            gone = without_credentials(f"{where}/{place}")
            raise UserError(f"{version.name}: what MLflow kept of it is gone ({gone}): {cure}") from error

    def _artifact(self, version: Version, fetched: Path) -> Path | None:
        """Find the logged folder: where MLflow keeps it if that is this machine, else a copy."""
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        place = {"artifact_path": f"{MODEL}/model", "tracking_uri": tracking_uri()}
        try:
            local = Path(download_artifacts(run_id=version.run_id, **place)).resolve()
            if content_hash(local) != version.hash:
                return None
        except (MlflowException, OSError, UserError):  # somebody removed them
            return None
        if local.is_relative_to(Path(tempfile.gettempdir()).resolve()):  # a download, which nobody would keep
            fetched.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(fetched, ignore_errors=True)
            shutil.move(local, fetched)
            return fetched
        return local

    def _create(self, made: lineage.Lineage, folder: Path, run_id: str) -> Version:
        from mlflow.exceptions import MlflowException

        tags = {
            "recipe": made["recipe"],
            "profile": made["profile"],
            "seed": str(made["seed"]),
            "git": made["code"]["commit"],
            "dirty": "yes" if made["code"]["dirty"] else "no",
            "stage": made["stage"],
            "folder": folder.as_posix(),
            "hash": made["hash"],
            "dvc_md5": made["dvc_md5"],
            "weights": "pointer",
        }
        self._client.log_dict(run_id, made, LINEAGE)
        self._client.log_dict(run_id, tags, f"{MODEL}/pointer.json")
        try:
            self._client.create_registered_model(NAME, description=MODEL_NOTE)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self._client.get_run(run_id).info.artifact_uri}/{MODEL}"
        start = made["recipes"][made["recipe"]]["start"]
        named = f"{made['recipe']} from {start}, {made['profile']}, seed {made['seed']}"
        created = self._client.create_model_version(NAME, source, run_id, tags=tags, description=named)
        return _version(created)

    def _log_weights(self, version: Version, folder: Path) -> None:
        with temporary_folder("model") as temporary:
            saved = temporary / "saved"
            save_mlflow_model(folder, saved)
            self._client.log_artifacts(version.run_id, str(saved), MODEL)
        self.tag(version, weights="artifact")  # last: only what has arrived counts


def model_folder(reference: str) -> Path:
    """Find a folder with the weights of `models:/search-agent@champion`, a version or a recipe.

    Its bytes are the registered ones. Raises UserError, and InfrastructureError when the store fails.
    """
    with store() as registry:
        return registry.folder(registry.named(reference))


@contextmanager
def store() -> Iterator[Registry]:
    """Give the registry. What MLflow raises becomes an InfrastructureError, or a UserError with the cure."""
    try:
        yield Registry(connect())
    except (UserError, InfrastructureError):
        raise
    except Exception as error:
        from google.protobuf.json_format import Error as InvalidAnswer
        from mlflow.exceptions import MlflowException  # not before connect(), which makes MLflow quiet
        from sqlalchemy.exc import SQLAlchemyError

        if not isinstance(error, MlflowException | SQLAlchemyError | InvalidAnswer):
            raise
        raise explained(error) from error


def _version(found: "ModelVersion") -> Version:
    return Version(str(found.version), str(found.run_id), dict(found.tags))
