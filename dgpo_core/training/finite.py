"""Training stops at the first number that is none: no weights are changed by it, and no model is saved."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from dgpo_core.errors import NotFinite


def require_finite(quantities: Mapping[str, float]) -> None:
    """Raise NotFinite for the first quantity that is nan or infinite."""
    for name, value in quantities.items():
        if not math.isfinite(value):
            raise NotFinite(name, value)


@contextmanager
def training_step(step: int, lower: Callable[[str], str]) -> Iterator[None]:
    """Raise a NotFinite from inside with the step and, from `lower(quantity)`, the setting to lower."""
    try:
        yield
    except NotFinite as error:
        cure = f"lower {lower(error.quantity)}"
        if step == 1:  # it may have come before any update
            cure += f"; if that does not help, {error.cure}"
        raise NotFinite(error.quantity, error.value, cure, step) from error


def broken_weight(module: torch.nn.Module) -> str | None:
    """Return the name of a weight with an entry that is nan or infinite; None where there is none."""
    for name, parameter in module.named_parameters():
        if parameter.numel() and not torch.stack(parameter.detach().aminmax()).isfinite().all():
            return name
    return None
