"""A model's weights in a folder, for an engine to read them from."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from dgpo_core.config.rollout import RolloutConfig
from dgpo_core.rollout.engine import Weights


@contextmanager
def weights_in_folder(weights: Weights, config: RolloutConfig) -> Iterator[str]:
    """A folder of our own below `weights_folder`, by its absolute path; tensors in `rollout.precision`."""
    home = Path(config.weights_folder).resolve()
    home.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config.precision)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        Path(folder).chmod(0o755)  # a server may run as another user
        # copies: a tied head and its embedding share memory, which the format does not have
        tensors = {
            name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in weights()
        }
        save_file(tensors, Path(folder) / "model.safetensors")
        yield folder
