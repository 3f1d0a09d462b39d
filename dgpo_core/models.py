"""Models as folders in the transformers format: build, load, save.

LoRA: low-rank adapters are trained in place of the weights, and become part of them in the end.
"""

import copy
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from dgpo_core.config.data import ModelShape
from dgpo_core.config.training import LoraConfig
from dgpo_core.errors import NotFinite, UserError
from dgpo_core.files import replacement
from dgpo_core.hub import HTTP_ERROR, hub_model, load_error

MAX_POSITIONS = 4096
ADAPTER = "adapter"  # folder in that of a model which was trained with LoRA
_LAYER = re.compile(r"\.layers\.(\d+)\.")  # in the names of weights

transformers_logging.disable_progress_bar()  # the stages have a progress display of their own


def build_model(shape: ModelShape, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build a freshly initialised model of `shape` for the tokenizer's vocabulary (float32)."""
    config = AutoConfig.for_model(
        shape.architecture,
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.5 * shape.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    _learn_all_embeddings(model)
    return model


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a model folder or hub name (`hub_model`).

    Raises UserError where there is none, InfrastructureError when the hub cannot be reached.
    """
    _check_source(source)
    if Path(source).is_dir() and not any(Path(source).glob("tokenizer*")):
        raise UserError(f"{source}: this model folder has no tokenizer (tokenizer.json is missing)")
    name, revision = hub_model(source)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # of its files transformers expects what it has written itself
        raise load_error(f"{source}: cannot load a tokenizer", error) from error


def load_model(source: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the causal language model of a folder or hub name (`hub_model`), in evaluation mode.

    Raises UserError for what is no model, has no safetensors, wants to run code of its own or has weights
    that are no numbers; InfrastructureError when the hub cannot be reached.
    """
    _check_source(source)
    name, revision = hub_model(source)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError, HTTP_ERROR) as error:
        raise load_error(f"{source}: cannot load a model", error) from error
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    if weight := broken_weight(model):
        raise UserError(f"{source}: {weight} has entries that are nan or infinite: this model is broken")
    _learn_all_embeddings(model)
    return model


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save weights and tokenizer, so that nothing of another model can be left in `folder`.

    Adapters become part of the weights; they stand by themselves in the folder's ADAPTER. Raises NotFinite
    for weights that are no numbers; then `folder` stays as it is.
    """
    if not torch.cuda.is_available():  # where DeepSpeed is installed transformers asks it, and it would warn
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with replacement(folder) as part:
        if hasattr(model, "peft_config"):
            _save_adapter(model, part / ADAPTER)
        model = merged(model)
        if name := broken_weight(model):
            raise NotFinite(f"weight {name}", math.nan, "the model is not saved: lower the learning rate")
        model.save_pretrained(part)
        if "local_files_only" in tokenizer.init_kwargs:  # whether this machine was offline (HF_HUB_OFFLINE)
            tokenizer.init_kwargs["local_files_only"] = False
        tokenizer.save_pretrained(part)
        for weights in part.rglob("*.safetensors"):  # which safetensors lets only their owner read
            weights.chmod((part / "config.json").stat().st_mode)


def kept_layers(layers: int, count: int) -> list[int]:
    """Return which of a model's layers a cut of `count` keeps: first and last, and evenly between.

    So are the students of "shrink and fine-tune" made (Shleifer and Rush, 2020, arXiv 2010.13002), where
    layers are copied with the largest distances. Raise UserError for a number that is none of 2 to `layers`.
    """
    if not 2 <= count <= layers:
        raise UserError(f"layers: {count}: the model has {layers} layers, and 2 or more must be kept")
    return [round(i * (layers - 1) / (count - 1)) for i in range(count)]


def cut_depth(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Return a model of `count` of the layers of `model` (`kept_layers`), with all its other weights."""
    config = copy.deepcopy(model.config)
    kept = kept_layers(config.num_hidden_layers, count)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    places = {layer: place for place, layer in enumerate(kept)}
    weights = {}
    for name, value in model.state_dict().items():
        layer = _LAYER.search(name)
        if layer is None:
            weights[name] = value
        elif int(layer[1]) in places:
            weights[_LAYER.sub(f".layers.{places[int(layer[1])]}.", name)] = value
    cut: PreTrainedModel = type(model)(config)
    torch.nn.Module.to(cut, dtype=model.dtype, device=model.device)
    cut.load_state_dict(weights)
    cut.tie_weights()
    cut.generation_config = model.generation_config
    cut.eval()
    _learn_all_embeddings(cut)
    return cut


def broken_weight(module: torch.nn.Module) -> str | None:
    """Return the name of a weight with an entry that is nan or infinite; None where there is none."""
    for name, parameter in module.named_parameters():
        if parameter.numel() and not torch.stack(parameter.detach().aminmax()).isfinite().all():
            return name
    return None


def _learn_all_embeddings(model: PreTrainedModel) -> None:
    """Let every input embedding have a gradient, in place.

    transformers makes config.pad_token_id the embedding's padding_idx, whose row torch never trains. Padding
    is masked here, and many models name their EOS as padding, which ends every turn.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def _check_source(source: str) -> None:
    """Raise UserError for a folder that is not there; hub names are `owner/name`.

    A longer path, or one in a folder that is here, means a folder.
    """
    path, name = Path(source), hub_model(source).name  # a revision may have slashes: refs/pr/1
    means_folder = (
        name.count("/") > 1 or name.startswith((".", "/")) or (path.parent.name and path.parent.is_dir())
    )
    if means_folder and not path.is_dir():
        raise UserError(f"{source}: there is no such model folder")


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Put adapters (float32) into `model`, in place, and freeze everything else. Raises UserError."""
    try:
        import peft
    except ImportError:
        raise UserError(
            "compute.lora needs the package peft: install the extra gpu (`pip install -e '.[gpu]'`), "
            "or set it to null"
        ) from None
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules="all-linear",
        base_model_name_or_path=model.name_or_path,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)  # the adapters' first matrix is random, the second one zero
    peft.inject_adapter_in_model(wanted, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.eval()


def _save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Save the adapters in PEFT's format: what it loads onto the model that training started from."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config: Any = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # a set has another order in each process
    config.save_pretrained(folder)
    state = get_peft_model_state_dict(model)
    named = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Return `model` with its adapters, if it has any, added to its weights (float32): an ordinary model."""
    if not hasattr(model, "peft_config"):
        return model
    from peft.tuners.lora import LoraLayer

    model.float()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)
