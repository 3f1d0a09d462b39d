"""What a stage read and wrote, as MLflow records it: data sets, small files, and pointers to large ones.

Imports mlflow's entities; each function is a job for the thread of `tasks.tracking.StageRun`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.files import content_hash
from tasks.paths import MODELS, PLOTS, REPORTS
from tasks.provenance import locked_outputs

if TYPE_CHECKING:
    from mlflow import MlflowClient

COPIED = (PLOTS, REPORTS)  # curves and report: for people, and small
MAX_COPY = 10_000_000  # bytes of one file; the report's page stays below 8 MB
MAX_DIGEST = 36  # characters, by MLflow's limit: DVC's digest of a folder fits, our SHA-256 is cut


def log_inputs(client: "MlflowClient", run_id: str, stage: str, hashes: Mapping[str, str]) -> None:
    """Inputs (path -> content hash) as MLflow data sets, by name and digest; nothing of them is loaded.

    Under DVC the digest is DVC's, as dvc.lock has it of the stage that made the file; otherwise, and for
    files that no stage makes, it is the beginning of ours.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    made = locked_outputs().values() if os.environ.get("DVC_STAGE") else ()
    known = {path: md5 for outputs in made for path, md5 in outputs.items()}
    inputs = []
    for path, digest in hashes.items():
        source = json.dumps({"uri": Path(path).resolve().as_uri()})
        dataset = Dataset(path, known.get(path, digest)[:MAX_DIGEST], "local", source)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", _context(stage, Path(path)))]))
    if inputs:
        client.log_inputs(run_id, inputs)


def log_outputs(client: "MlflowClient", run_id: str, pointers: Mapping[str, Mapping[str, Any]]) -> None:
    """`outputs.json` with what `pointer` says of every output, and the files of COPIED folders themselves."""
    client.log_dict(run_id, dict(pointers), "outputs.json")
    for path in map(Path, pointers):
        if any(path.is_relative_to(folder) for folder in COPIED):
            for file in _files(path):
                if file.stat().st_size <= MAX_COPY:
                    client.log_artifact(run_id, str(file), file.parent.as_posix())


def describe(outputs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """{path: {"sha256", "bytes", "files"}} of each output: enough to know it again, wherever it is kept."""
    return {
        path.as_posix(): {
            "sha256": content_hash(path),
            "bytes": sum(file.stat().st_size for file in _files(path)),
            "files": len(_files(path)),
        }
        for path in outputs
    }


def _context(stage: str, path: Path) -> str:
    """What an input is for: MLflow shows it beside the data set's name."""
    if path.is_relative_to(MODELS):
        return "model"
    return "evaluation" if stage.startswith(("evaluate@", "report")) else "training"


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
