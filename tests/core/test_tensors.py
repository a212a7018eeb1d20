"""Second moments and float64 solves, against explicit sums and inverses."""

from __future__ import annotations

import pytest
import torch

from transfuse.core.errors import BadInput
from transfuse.core.tensors import Factor, SecondMoment


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_second_moment_is_the_mean_outer_product_however_it_is_cut(dtype):
    x = noise(37, 5, dtype=dtype)
    wanted = torch.zeros(5, 5, dtype=torch.float64)
    for row in x.double():
        for i in range(5):
            for j in range(5):
                wanted[i, j] += row[i] * row[j] / 37
    whole, parts = SecondMoment(5), SecondMoment(5)
    whole.add(x)
    for piece in x.split([1, 20, 0, 16]):
        parts.add(piece)
    assert whole.count == parts.count == 37
    for moment in (whole, parts):
        assert torch.allclose(moment.matrix, wanted, rtol=0, atol=1e-6)
        assert torch.equal(moment.matrix, moment.matrix.T)


def test_second_moment_does_not_lose_small_batches_after_many():
    """Sums in float32 would stop growing at 2**24."""
    moment = SecondMoment(1)
    moment.add(torch.full((1, 1), 4096.0))
    for _ in range(64):
        moment.add(torch.full((1, 1), 0.5))
    assert moment.matrix.item() == (4096.0**2 + 64 * 0.25) / 65


def test_second_moment_refuses_wrong_widths_and_broken_values():
    moment = SecondMoment(3)
    with pytest.raises(BadInput, match="leaves no moment"):
        _ = moment.matrix
    with pytest.raises(BadInput, match=r"are not \[n, 3\]"):
        moment.add(torch.zeros(2, 4))
    moment.add(torch.ones(1, 3))
    with pytest.raises(BadInput, match="cannot be summed"):
        moment.add(torch.tensor([[1.0, float("nan"), 0.0]]))
    assert moment.count == 1 and torch.equal(moment.matrix, torch.ones(3, 3, dtype=torch.float64))


def test_factor_solves_like_the_inverse():
    x = noise(40, 6, dtype=torch.float64)
    a = x.T @ x / 40
    factor = Factor(a.float().double())
    inverse = torch.linalg.inv(a.float().double())
    b = noise(6, 3, seed=1)
    assert torch.allclose(factor.solve(b), inverse @ b.double(), atol=1e-10)
    assert torch.allclose(factor.solve(b[:, 0]), inverse @ b[:, 0].double(), atol=1e-10)
    assert torch.allclose(factor.matrix, a.float().double(), atol=1e-12) and factor.width == 6


def test_ridge_is_a_share_of_the_mean_diagonal_and_mends_rank_deficiency():
    x = noise(2, 4, dtype=torch.float64)
    a = x.T @ x
    with pytest.raises(BadInput, match="not positive definite; take it from more samples"):
        Factor(a)
    mended = Factor(a, ridge=0.01)
    assert torch.allclose(mended.matrix, a + 0.01 * a.trace() / 4 * torch.eye(4, dtype=torch.float64))
    assert torch.equal(a, x.T @ x)  # the argument is left alone


def test_factor_refuses_what_is_no_matrix():
    with pytest.raises(BadInput, match="not square"):
        Factor(torch.zeros(2, 3))
    with pytest.raises(BadInput, match="ridge"):
        Factor(torch.eye(2), ridge=-1.0)
