"""Models in llama.cpp's format (GGUF) as ordinary model folders; nothing else needs the extra `smol`."""

import copy
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dgpo_core.errors import UserError, first_line
from dgpo_core.models import save_model

NEEDED = ("gguf", "accelerate")  # by transformers, which reads the file


def convert(file: Path, folder: Path) -> None:
    """Write the model of `file` to `folder`: weights in bfloat16, tokenizer, chat template, stop tokens.

    Quantised weights become the numbers that they stand for. Raises UserError for what is no such file, and
    where a package is missing.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{file}: to read it the package {missing[0]} is needed: "
            "pip install -c constraints/main.txt -e '.[smol]'"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file}: cannot load a model: {first_line(error)}") from error
    # transformers refuses to save what it calls quantised: the weights go into a fresh model
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    save_model(model.bfloat16(), tokenizer, folder)
