"""A seed's finished run as a small folder: all that the report reads, and where it is from.

    <folder>/<seed>/record.json, evaluation/<model>/{questions,arcap}.parquet, plots/*.csv

Seeds that ran on other machines or days so come into one report: `dgpo pool <folder>`.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open

from dgpo_core.config.base import Section
from dgpo_core.errors import UserError
from dgpo_core.files import PART, replacement, write_text
from dgpo_core.reporting.formats import GIVEN, as_json
from dgpo_core.reporting.reproduction.tables import write_reproduction

RECORD = "record.json"
TABLES = ("questions.parquet", "arcap.parquet")


class Record(Section):
    """What a seed's numbers are: of which code, models and questions."""

    profile: str
    seed: int
    commit: str
    models: list[str]
    mirrors: dict[str, str]  # data set -> the paper's
    pair: str
    first: dict[str, int]  # questions that count, where not all of a set do
    parameters: dict[str, int] = Field({}, description="of the given models")
    families: dict[str, str] = Field({}, description="of the given models: transformers' model_type")

    @property
    def comparable(self) -> dict[str, object]:
        """What seeds of one report must have in common."""
        return self.model_dump(exclude={"seed", "commit", "parameters", "families", "models"})


@dataclass(frozen=True)
class Pooled:
    """What a report of several seeds is about; `left_out`: models that not every seed has, with the seeds
    that lack them."""

    profile: str
    models: list[str]
    left_out: dict[str, list[int]]


def keep(run: Path, folder: Path, record: Record) -> Path:
    """Copy what the report reads of a finished run into `folder/<seed>`, in place of what is there.

    Raises UserError for a file that the run does not have.
    """
    out = folder / str(record.seed)
    with replacement(out) as part:
        try:
            for model in record.models:
                (part / "evaluation" / model).mkdir(parents=True)
                for name in TABLES:
                    shutil.copyfile(run / "evaluation" / model / name, part / "evaluation" / model / name)
        except OSError as error:
            raise UserError(f"seed {record.seed}: {error.filename}: {error.strerror}") from error
        (part / "plots").mkdir()
        for curve in sorted((run / "plots").glob("*.csv")):
            shutil.copyfile(curve, part / "plots" / curve.name)
        counted = record.model_copy(update={"parameters": parameter_counts(run), "families": families(run)})
        write_text(part / RECORD, as_json(counted.model_dump()))
    return out


def find_records(folder: Path) -> list[Path]:
    """The folders below `folder` that have a seed's record, but for what a killed or running `keep` left."""
    found = (file.parent for file in folder.rglob(RECORD))
    return sorted(path for path in found if path.suffix != PART)


def pool(records: list[Path], out: Path) -> Pooled:
    """Write the report of these seeds' records into `out`, on the models that all of them have.

    Raises UserError for none, a broken one, a seed that is there twice, and seeds that cannot be compared.
    """
    if not records:
        raise UserError(f"no {RECORD} of a seed: nothing to report")
    read = {path: read_record(path) for path in records}
    first = require_comparable(list(read.items()))
    roots: dict[int, Path] = {}
    for path, record in read.items():
        if record.seed in roots:
            raise UserError(f"{path / RECORD}: seed {record.seed} is in {roots[record.seed]} too")
        roots[record.seed] = path
    pooled = _pooled(list(read.values()))
    if not pooled.models:
        raise UserError(f"{', '.join(map(str, records))}: no model is in all of them")
    commits = {record.seed: record.commit for record in read.values()}
    write_reproduction(
        roots, out, pooled.models, first.mirrors, first.pair, first.first, first.parameters, commits
    )
    return pooled


def require_comparable(records: list[tuple[Path, Record]]) -> Record:
    """The first of the records; raises UserError naming the one that is not comparable with it."""
    start, first = records[0]
    for path, record in records[1:]:
        if record.comparable != first.comparable:
            keys = [k for k, v in record.comparable.items() if v != first.comparable[k]]
            raise UserError(f"{path / RECORD}: not comparable with {start}: {', '.join(keys)}")
    return first


def _pooled(records: list[Record]) -> Pooled:
    everything = dict.fromkeys(model for record in records for model in record.models)
    lacking = {m: [record.seed for record in records if m not in record.models] for m in everything}
    models = [model for model, seeds in lacking.items() if not seeds]
    return Pooled(records[0].profile, models, {model: seeds for model, seeds in lacking.items() if seeds})


def read_record(path: Path) -> Record:
    """The record in the folder `path`; raises UserError."""
    try:
        return Record.model_validate_json((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"{path / RECORD}: {said}") from error


def parameter_counts(root: Path) -> dict[str, int]:
    """Parameters of the given models whose folders a run has (`models/<name>/*.safetensors`)."""
    counts = {}
    for name in GIVEN:
        files = sorted((root / "models" / name).glob("*.safetensors"))
        if files:
            counts[name] = sum(_parameters(file) for file in files)
    return counts


def _parameters(file: Path) -> int:
    try:
        with safe_open(file, framework="numpy") as tensors:
            names: list[str] = tensors.keys()
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file: {error}") from error


def families(root: Path) -> dict[str, str]:
    """`model_type` of the given models whose folders a run has."""
    found = {}
    for name in GIVEN:
        file = root / "models" / name / "config.json"
        if file.exists():
            try:
                found[name] = str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}: no model_type of transformers: {error}") from error
    return found
