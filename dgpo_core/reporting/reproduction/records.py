"""A seed's finished run as a small folder: all that the report reads, and where it is from.

    <folder>/<seed>/record.json, evaluation/<model>/{questions,arcap}.parquet, plots/*.csv

Seeds that ran on other machines or days so come into one report: `dgpo pool <folder>`.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from dgpo_core.config.base import Section
from dgpo_core.errors import UserError
from dgpo_core.reporting.files import as_json, write_texts
from dgpo_core.reporting.reproduction.sizes import parameter_counts
from dgpo_core.reporting.reproduction.write import write_reproduction

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

    @property
    def comparable(self) -> dict[str, object]:
        """What seeds of one report must have in common."""
        return self.model_dump(exclude={"seed", "commit", "parameters", "models"})


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
    temporary = folder / f"{record.seed}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for model in record.models:
            (temporary / "evaluation" / model).mkdir(parents=True)
            for name in TABLES:
                shutil.copyfile(run / "evaluation" / model / name, temporary / "evaluation" / model / name)
    except OSError as error:
        raise UserError(f"seed {record.seed}: {error.filename}: {error.strerror}") from error
    (temporary / "plots").mkdir()
    for curve in sorted((run / "plots").glob("*.csv")):
        shutil.copyfile(curve, temporary / "plots" / curve.name)
    counted = record.model_copy(update={"parameters": parameter_counts(run)})
    write_texts(temporary, {RECORD: as_json(counted.model_dump())})
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return out


def pool(records: list[Path], out: Path) -> Pooled:
    """Write the report of these seeds' records into `out`, on the models that all of them have.

    Raises UserError for none, a broken one, a seed that is there twice, and seeds that cannot be compared.
    """
    if not records:
        raise UserError(f"no {RECORD} of a seed: nothing to report")
    read = {path: _read(path) for path in records}
    first = next(iter(read.values()))
    roots: dict[int, Path] = {}
    for path, record in read.items():
        if record.comparable != first.comparable:
            keys = [k for k, v in record.comparable.items() if v != first.comparable[k]]
            raise UserError(f"{path / RECORD}: not comparable with {records[0]}: {', '.join(keys)}")
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


def _pooled(records: list[Record]) -> Pooled:
    everything = dict.fromkeys(model for record in records for model in record.models)
    lacking = {m: [record.seed for record in records if m not in record.models] for m in everything}
    models = [model for model, seeds in lacking.items() if not seeds]
    return Pooled(records[0].profile, models, {model: seeds for model, seeds in lacking.items() if seeds})


def _read(path: Path) -> Record:
    try:
        return Record.model_validate_json((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"{path / RECORD}: {said}") from error
