"""What is checked before the first stage runs: a run that must fail should do so at once."""

from pathlib import Path

from tokenizers import Tokenizer

from dgpo_core.config.params import PARAMS, Params, load_params
from dgpo_core.training.vocabulary import check_same_vocabulary

VOCABULARY = "tokenizer.json"


def preflight(root: Path = Path()) -> None:
    """Raises UserError for parameters that no run can have; models on the hub are checked by their stages."""
    if not (root / PARAMS).is_file():
        return  # the stage that needs it will say so
    params = load_params(root / PARAMS)
    files = [root / source / VOCABULARY for source in (params.models.student, params.models.teacher)]
    if _compares_distributions(params) and all(file.is_file() for file in files):
        check_same_vocabulary(*(Tokenizer.from_file(str(file)) for file in files))


def _compares_distributions(params: Params) -> bool:
    distilled = any(recipe.objective != "ce" for recipe in params.recipes.distill.values())
    return distilled or any(recipe.reference == "teacher" for recipe in params.recipes.reinforce.values())
