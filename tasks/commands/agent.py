"""The agent that `dgpo ask` and `dgpo serve` open: a model by any of its names, with the index."""

import sys
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dgpo_core.config.params import PARAMS, Params
from dgpo_core.config.recipes import STUDENT, TEACHER
from dgpo_core.datasets.records import read_questions
from dgpo_core.errors import UserError
from tasks.project.paths import INDEX, MODELS, questions_file
from tasks.stages.inputs import model_source

if TYPE_CHECKING:
    from dgpo_core.serving.agent import Agent

EXAMPLES = 3
CHAMPION = "models:/search-agent@champion"
REGISTRY = "models:/"
EngineName = Literal["transformers", "llama-cpp"]


def resolve_model(params: Params, reference: str | None) -> str:
    """Return folder or hub name of a recipe, `student`, `teacher`, a folder, or `models:/name@alias`.

    None is the registered champion or, without one, the last of the recipes that is trained; which one is
    said on stderr. Raises UserError for a model that there is not.
    """
    if reference is None:
        return _default_model(params)
    if reference.startswith(REGISTRY):
        return _registered_model(reference)
    if reference == TEACHER and params.models.endpoint is not None:
        raise UserError(
            f"--model teacher: {params.models.teacher} is an endpoint, no model to be loaded here"
        )
    if reference in (STUDENT, TEACHER):
        return model_source(params, reference)
    if reference in params.recipes.all:
        source = model_source(params, reference)
        if not Path(source).is_dir():
            raise UserError(f"{source}: {reference} is not trained yet; run `dvc repro evaluate@{reference}`")
        return source
    if Path(reference).is_dir():
        return reference
    known = ", ".join([STUDENT, TEACHER, *params.recipes.all])
    raise UserError(
        f"--model {reference}: no such folder, and no such model: {known}, or {REGISTRY}name@alias"
    )


def require_index() -> None:
    """Raise UserError, before anything is loaded, when there is no index."""
    if not INDEX.is_dir():
        raise UserError(f"{INDEX}: there is no index yet; run `make demo`, or `dvc repro index`")


def example_questions(params: Params) -> list[str]:
    """Return some validation questions, of each training set in turn; none where there are no files."""
    files = (questions_file(name, "dev") for name in params.questions.train)
    sets = [read_questions(file)[:EXAMPLES] for file in files if file.is_file()]
    mixed = chain.from_iterable(zip_longest(*sets))
    return [question.question for question in mixed if question][:EXAMPLES]


def open_agent(
    params: Params, source: str, reference: str | None, engine: EngineName = "transformers"
) -> "Agent":
    """Load the model in `source`, which somebody gave as `reference`, and the index.

    Raises UserError, and InfrastructureError when the retriever is down.
    """
    # torch and transformers take seconds to import: what can be wrong before them has been found by now
    from dgpo_core.agent.llama_cpp_engine import LlamaCppEngine
    from dgpo_core.agent.transformers_engine import TransformersEngine
    from dgpo_core.models import load_model, load_tokenizer
    from dgpo_core.serving.agent import Agent
    from tasks.stages.inputs import retriever

    tokenizer = load_tokenizer(source)
    generator: TransformersEngine | LlamaCppEngine
    if engine == "llama-cpp":
        generator = LlamaCppEngine(Path(source), tokenizer, params.protocol.max_context)
    else:
        generator = TransformersEngine(load_model(source, params.compute.device), tokenizer, params.rollout)
    name, index = model_name(reference, source), retriever(params)
    return Agent(name, generator, tokenizer, index, params.protocol, params.retrieval.top_k)


def model_name(reference: str | None, source: str) -> str:
    """Return what people call the model: the reference, or a folder's name without the machine's paths."""
    return Path(source).name if reference is None or Path(reference).is_dir() else reference


def _registered_model(reference: str) -> str:
    from tasks.tracking.registry import model_folder  # MLflow takes a second to import

    return str(model_folder(reference))


def _default_model(params: Params) -> str:
    try:
        return _registered_model(CHAMPION)
    except UserError as error:
        reason = str(error)
    recipes = [MODELS / name for name in params.recipes.all]
    trained = [folder for folder in recipes if (folder / "config.json").is_file()]
    if not trained:
        raise UserError(
            f"{MODELS}: there is no champion and no trained recipe; run `make demo`, or name a model, "
            "such as --model teacher"
        )
    last = trained[-1]  # RL comes after distillations there; of what ran side by side, any may be the newest
    print(f"model {last}, the last trained recipe of {PARAMS} ({reason})", file=sys.stderr, flush=True)
    return str(last)
