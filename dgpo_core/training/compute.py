"""Device and precision of training passes."""

import contextlib
from typing import Any

import torch

from dgpo_core.config.training import ComputeConfig


def autocast(config: ComputeConfig) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 compute over float32 weights, or plain float32; DeepSpeed's weights are bfloat16."""
    if config.precision == "float32" or config.engine == "deepspeed":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16)
