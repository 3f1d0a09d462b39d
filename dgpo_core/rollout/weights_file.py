"""A model's weights in a folder, for an engine to read them from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from dgpo_core.config.rollout import RolloutConfig
from dgpo_core.rollout.engine import Weights
from dgpo_core.temporary import temporary_folder


@contextmanager
def weights_in_folder(weights: Weights, config: RolloutConfig) -> Iterator[str]:
    """A folder of our own below `weights_folder`, by its absolute path; tensors in `rollout.precision`."""
    home = Path(config.weights_folder).resolve()
    home.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config.precision)
    with temporary_folder("weights", home) as folder:
        folder.chmod(0o755)  # a server may run as another user
        # copies: a tied head and its embedding share memory, which the format does not have
        tensors = {
            name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in weights()
        }
        save_file(tensors, folder / "model.safetensors")
        yield str(folder)
