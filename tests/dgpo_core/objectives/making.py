"""What tests of objectives share."""

from collections.abc import Callable

from torch import Tensor

from dgpo_core.objectives.divergences import Divergence


def made_inside(make: Callable[[float], Divergence], share: float) -> Divergence:
    """Make the divergence anew in each call, hence inside the test: `make mutants` changes nothing before."""

    def divergence(teacher: Tensor, student: Tensor) -> Tensor:
        return make(share)(teacher, student)

    return divergence
