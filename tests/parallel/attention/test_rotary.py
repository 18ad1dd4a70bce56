"""Rotation against complex numbers in float64, its inverse, and what attention needs of it."""

import pytest
import torch
from torch import Tensor

from parallel.attention import rotary
from parallel.attention.rotary import apply_rotary, rotary_table

POSITIONS = torch.cat((torch.arange(37), torch.arange(5), torch.arange(120, 140)))


def _complex_rotation(x: Tensor, positions: Tensor, base: float, rotary_dim: int) -> Tensor:
    """z_j * exp(i p theta_j) with z_j = x_j + i x_{j + rotary_dim / 2}, in float64."""
    half = rotary_dim // 2
    x = x.double()
    z = torch.complex(x[..., :half], x[..., half:rotary_dim])
    theta = torch.tensor([base ** (-2 * j / rotary_dim) for j in range(half)], dtype=torch.float64)
    turn = torch.exp(1j * positions.double()[:, None] * theta)[:, None, :]
    turned = z * turn
    return torch.cat((turned.real, turned.imag, x[..., rotary_dim:]), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_dim", "percent"), [(64, 1.0), (10, 1.0), (64, 0.25), (6, 0.34)])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_equals_complex_rotation(
    dtype: torch.dtype, head_dim: int, percent: float, base: float
) -> None:
    x = torch.randn(len(POSITIONS), 3, head_dim).to(dtype)
    table = rotary_table(POSITIONS, head_dim=head_dim, rotary_base=base, rotary_percent=percent)
    found = apply_rotary(x, table=table)
    exact = _complex_rotation(x, POSITIONS, base, table.rotary_dim)
    assert found.dtype == dtype
    # The table and three float32 operations, then one rounding to dtype (half a unit).
    largest = float(x.double().abs().max()) * 2**0.5
    allowed = largest * (5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2)
    assert float((found.double() - exact).abs().max()) <= allowed


def test_position_zero_is_left_alone() -> None:
    x = torch.randn(4, 2, 8)
    table = rotary_table(torch.zeros(4, dtype=torch.int64), head_dim=8)
    assert torch.equal(apply_rotary(x, table=table), x)


def test_chunks_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(len(POSITIONS), 3, 16)
    table = rotary_table(POSITIONS, head_dim=16, rotary_percent=0.5)
    together = apply_rotary(x, table=table)
    for chunk in (1, 5 * 3 * 8):
        monkeypatch.setattr(rotary, "CPU_CHUNK", chunk)
        assert torch.equal(apply_rotary(x, table=table), together)


def test_no_tokens() -> None:
    table = rotary_table(torch.zeros(0, dtype=torch.int64), head_dim=8)
    assert apply_rotary(torch.zeros(0, 2, 8), table=table).shape == (0, 2, 8)


def test_far_positions_keep_their_angle() -> None:
    positions = torch.tensor([0, 1_999_999, 2_000_000])
    x = torch.randn(3, 2, 64)
    found = apply_rotary(x, table=rotary_table(positions, head_dim=64))
    exact = _complex_rotation(x, positions, 10000.0, 64)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


def test_products_depend_on_distance_alone() -> None:
    query, key = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def product(at_query: int, at_key: int) -> float:
        turned = [
            apply_rotary(x.double(), table=rotary_table(torch.tensor([place]), head_dim=64))
            for x, place in ((query, at_query), (key, at_key))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(7, 3) == pytest.approx(product(1007, 1003), abs=1e-5)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-2)


def test_gradient_is_the_rotation_back() -> None:
    table = rotary_table(POSITIONS, head_dim=6, rotary_percent=0.67)
    x = torch.randn(len(POSITIONS), 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, table=table), (x,))
    (grad,) = torch.autograd.grad(apply_rotary(x, table=table), x, apply_rotary(x, table=table))
    torch.testing.assert_close(grad, x.detach(), rtol=0, atol=1e-6)


def test_nothing_but_the_table_is_kept_for_backward() -> None:
    table = rotary_table(POSITIONS, head_dim=64)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    x = torch.randn(len(POSITIONS), 2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        apply_rotary(x, table=table)
    assert set(kept) == {table.cos.data_ptr(), table.signed_sin.data_ptr()}


@pytest.mark.parametrize(("head_dim", "percent"), [(7, 1.0), (64, 0.0), (64, 1.5), (10, 0.5)])
def test_parts_that_cannot_turn_are_refused(head_dim: int, percent: float) -> None:
    with pytest.raises(ValueError, match="even number"):
        rotary_table(POSITIONS, head_dim=head_dim, rotary_percent=percent)
