"""The loop with its own gradient is the loop with torch's, and loads need few shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.expert_loop import filled_up
from moe.experts import GroupedLinear, run_experts
from tests.megatron_ext.tolerance import assert_as_good_as_plain

COUNTS = ([3, 4, 5], [0, 12, 0], [70, 0, 64], [0, 0, 0], [130])


def run(dtype: torch.dtype, counts: list[int], backend: GroupedLinear) -> list[Tensor]:
    """Output and all gradients."""
    generator = torch.Generator().manual_seed(sum(counts))
    shapes = [(sum(counts), 16), (len(counts), 48, 16), (len(counts), 16, 24)]
    leaves = [
        torch.randn(shape, generator=generator).bfloat16().to(dtype).requires_grad_()
        for shape in shapes
    ]
    output = run_experts(leaves[0], torch.tensor(counts), leaves[1], leaves[2], backend=backend)
    grad = torch.randn(output.shape, generator=generator).bfloat16().to(dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equals_the_loop(counts: list[int]) -> None:
    for found, expected in zip(
        run(torch.float64, counts, "auto"), run(torch.float64, counts, "loop"), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_is_as_exact_as_the_loop(counts: list[int], dtype: torch.dtype) -> None:
    names = ("output", "gradient of rows", "of linear_fc1", "of linear_fc2")
    exact = run(torch.float64, counts, "loop")
    plain, found = run(dtype, counts, "loop"), run(dtype, counts, "auto")
    for name, value, plain_value, exact_value in zip(names, found, plain, exact, strict=True):
        assert value.dtype == dtype
        assert_as_good_as_plain(
            value, plain=plain_value, exact=exact_value, what=f"{counts}: {name}"
        )


def test_rows_that_need_no_gradient_get_none() -> None:
    rows = torch.randn(5, 4)
    weights = [torch.randn(2, 6, 4), torch.randn(2, 4, 3)]
    leaves = [weight.requires_grad_() for weight in weights]
    output = run_experts(rows, torch.tensor([2, 3]), *leaves)
    assert all(bool(g.any()) for g in torch.autograd.grad(output.sum(), leaves))


def test_filling_up() -> None:
    assert filled_up([0, 1, 64, 65], 64) == [0, 64, 64, 128]
    assert filled_up([0, 1, 7], 1) == [0, 1, 7]
