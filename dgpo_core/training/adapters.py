"""LoRA: low-rank adapters are trained in place of the weights, and become part of them in the end."""

import torch
from transformers import PreTrainedModel

from dgpo_core.config.training import LoraConfig
from dgpo_core.errors import UserError


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Put adapters (float32) into `model`, in place, and freeze everything else. Raises UserError."""
    try:
        import peft
    except ImportError:
        raise UserError(
            "compute.lora needs the package peft: install the extra gpu (`pip install -e '.[gpu]'`), "
            "or set it to null"
        ) from None
    wanted = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules="all-linear")
    torch.manual_seed(seed)  # the adapters' first matrix is random, the second one zero
    peft.inject_adapter_in_model(wanted, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.eval()


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, whose adapters, if it has any, were added to its weights (float32): an ordinary model."""
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
