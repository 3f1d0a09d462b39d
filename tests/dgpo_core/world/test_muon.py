"""Muon: torch's own is the oracle."""

from collections.abc import Callable

import pytest
import torch

from dgpo_core.world.pretraining import Muon, orthogonalised

SHAPES = [(6, 6), (4, 9), (9, 4)]


def trained(kind: Callable[..., torch.optim.Optimizer], **options: object) -> list[torch.Tensor]:
    """Three matrices after four steps; the second has no gradient in the third step."""
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = kind(matrices, lr=0.02, weight_decay=0.01, **options)
    for step in range(4):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape)
        if step == 2:
            matrices[1].grad = None
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def test_in_bfloat16_the_weights_are_those_of_torch() -> None:
    theirs = trained(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    assert all(torch.equal(*pair) for pair in zip(trained(Muon), theirs, strict=True))


def test_in_float32_they_are_close() -> None:
    for ours, theirs in zip(trained(Muon, dtype=torch.float32), trained(Muon), strict=True):
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalised_keeps_directions_and_levels_their_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = orthogonalised(matrix, torch.float32)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    sizes = u.T @ result @ v.T
    torch.testing.assert_close(sizes, torch.diag(sizes.diag()), rtol=0, atol=1e-4)
    assert ((sizes.diag() > 0.5) & (sizes.diag() < 1.5)).all()


def test_state_continues_exactly() -> None:
    def steps(matrix: torch.nn.Parameter, optimizer: Muon, numbers: range) -> None:
        for number in numbers:
            matrix.grad = torch.full_like(matrix, number + 1.0)
            optimizer.step()

    whole, part = (torch.nn.Parameter(torch.eye(3)) for _ in range(2))
    steps(whole, Muon([whole], 0.1), range(4))
    first = Muon([part], 0.1)
    steps(part, first, range(2))
    second = Muon([part], 0.1)
    second.load_state_dict(first.state_dict())
    steps(part, second, range(2, 4))
    assert torch.equal(whole, part)
