"""Check what can be checked before the first stage runs: a run that must fail should do so at once."""

from pathlib import Path

from tokenizers import Tokenizer

from dgpo_core.config.params import PARAMS, load_params
from dgpo_core.hub import cached_file
from dgpo_core.vocabulary import check_same_vocabulary

VOCABULARY = "tokenizer.json"


def preflight(root: Path = Path()) -> None:
    """Raise UserError for parameters that no run can have.

    Nothing is downloaded: of models that are still on the hub alone, `teach` compares the vocabularies.
    """
    if not (root / PARAMS).is_file():
        return  # the stage that needs it will say so
    params = load_params(root / PARAMS)
    models = (params.models.student, params.models.teacher)
    files = [model_file(source, VOCABULARY, root) for source in models]
    if params.need_one_vocabulary and None not in files:
        check_same_vocabulary(*(Tokenizer.from_file(str(file)) for file in files))


def model_file(source: str, name: str, root: Path = Path()) -> Path | None:
    """Return a file of a model in a folder, or of one in the hub's cache; None where it has none here."""
    if not (root / source).is_dir():
        return cached_file(source, name)
    file = root / source / name
    return file if file.is_file() else None
