"""Numbers that are none end a training, before weights are changed by them, and say what to lower."""

import math

import pytest
import torch

from dgpo_core.errors import NotFinite
from dgpo_core.models import broken_weight
from dgpo_core.training.checkpoint import require_finite, training_step


@pytest.mark.parametrize(
    ("value", "said"), [(math.nan, "not a number"), (math.inf, "infinite"), (-math.inf, "infinite")]
)
def test_the_first_quantity_that_is_none_is_named_with_step_and_setting(value: float, said: str) -> None:
    require_finite({"loss": 1e30, "ce": 0.0})
    with (
        pytest.raises(NotFinite, match=f"^the ce of step 7 is {said}; lower the rate of ce$"),
        training_step(7, lambda quantity: f"the rate of {quantity}"),
    ):
        require_finite({"loss": 0.5, "ce": value, "grad_norm": math.nan})


def test_in_the_first_step_no_rate_may_be_to_blame() -> None:
    with (
        pytest.raises(
            NotFinite, match=r"of step 1 is .*lower the rate; if that does not help, the model's weig"
        ),
        training_step(1, lambda _: "the rate"),
    ):
        require_finite({"loss": math.nan})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_broken_entry_is_found(value: float, dtype: torch.dtype) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)).to(dtype)
    module.register_parameter("empty", torch.nn.Parameter(torch.empty(0, 4, dtype=dtype)))
    assert broken_weight(module) is None
    with torch.no_grad():
        dict(module.named_parameters())["1.weight"][1, 3] = value
    assert broken_weight(module) == "1.weight"
