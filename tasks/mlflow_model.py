"""A trained folder as an MLflow model, which everybody loads who has MLflow and transformers."""

import logging
import shutil
from pathlib import Path


def save_mlflow_model(folder: Path, saved: Path, name: str) -> None:
    """An MLflow model of the transformers flavour; `saved/model` is the folder byte for byte."""
    import mlflow.transformers
    import torch
    import transformers
    from huggingface_hub import ModelCard

    from dgpo_core.training.models import load_model, load_tokenizer

    source = str(folder.resolve())
    pipeline = transformers.pipeline(
        "text-generation", model=load_model(source), tokenizer=load_tokenizer(source)
    )
    logging.getLogger("mlflow.transformers").setLevel(logging.ERROR)  # it misses a licence on the hub
    mlflow.transformers.save_model(
        pipeline,
        saved,
        # given, because they would be looked for on the hub, and by importing everything in a new process
        model_card=ModelCard(f"---\nlibrary_name: transformers\n---\n\n# {name}\n"),
        pip_requirements=[
            f"torch=={torch.__version__.partition('+')[0]}",
            f"transformers=={transformers.__version__}",
        ],
    )
    shutil.rmtree(saved / "model")
    shutil.copytree(folder, saved / "model")
