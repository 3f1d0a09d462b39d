"""What is checked before the first stage runs: a run that must fail should do so at once."""

from pathlib import Path

from tokenizers import Tokenizer

from dgpo_core.config.params import PARAMS, load_params
from dgpo_core.training.batches import check_same_vocabulary
from tasks.commands.checks.hub import cached_file

VOCABULARY = "tokenizer.json"


def preflight(root: Path = Path()) -> None:
    """Raises UserError for parameters that no run can have.

    Nothing is downloaded: of models that are still on the hub alone, `teach` compares the vocabularies.
    """
    if not (root / PARAMS).is_file():
        return  # the stage that needs it will say so
    params = load_params(root / PARAMS)
    files = [_vocabulary(root, source) for source in (params.models.student, params.models.teacher)]
    if params.recipes.need_one_vocabulary and None not in files:
        check_same_vocabulary(*(Tokenizer.from_file(str(file)) for file in files))


def _vocabulary(root: Path, source: str) -> Path | None:
    """The file of a model in a folder, or of one in the hub's cache."""
    if not (root / source).is_dir():
        return cached_file(source, VOCABULARY)
    file = root / source / VOCABULARY
    return file if file.is_file() else None
