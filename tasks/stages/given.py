"""Stage `given`: link models/given/<student or teacher> to the model that the pipeline starts from.

dvc.yaml cannot name a folder that params.yaml may give or not (a model may be on the hub), so stages depend
on the link: DVC hashes what is behind it, and sees another model as well as other files of the same one.
"""

import os
from pathlib import Path

from dgpo_core.config.params import load_params
from dgpo_core.config.recipes import STUDENT, TEACHER
from dgpo_core.errors import UserError
from dgpo_core.files import remove, write_text
from tasks.project.paths import GIVEN
from tasks.stages.inputs import model_source
from tasks.stages.stage import stage_main


def link(model: str) -> None:
    """Link to the model's folder, or write a file with its name where it is on the hub or elsewhere."""
    if model not in (STUDENT, TEACHER):
        raise UserError(f"{model}: the given models are {STUDENT} and {TEACHER}")
    name, given = model_source(load_params(), model), GIVEN / model
    source = Path(name)
    if not source.is_dir():
        write_text(given, f"{name}\n")
        return
    target = source if source.is_absolute() else Path(os.path.relpath(source, GIVEN))
    if not (given.is_symlink() and given.readlink() == target):
        GIVEN.mkdir(parents=True, exist_ok=True)
        remove(given)
        given.symlink_to(target)


if __name__ == "__main__":
    stage_main("given", link, "model")
