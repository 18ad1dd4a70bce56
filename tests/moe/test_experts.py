"""Experts of one rank: the loop against the formula, the grouped product against the loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.experts import GroupedLinear, grouped_linear, run_experts, why_not_grouped_mm
from tests.megatron_ext.tolerance import assert_as_good_as_plain

COUNTS = ([3, 4, 5], [0, 12, 0], [1, 0, 2], [0, 0, 0], [7])


def linear(rows: Tensor, weight: Tensor, counts: list[int], backend: GroupedLinear) -> list[Tensor]:
    """Output and both gradients."""
    rows, weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    output = grouped_linear(rows, weight, torch.tensor(counts), backend=backend)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(rows.dtype)
    return [output.detach(), *torch.autograd.grad(output, (rows, weight), grad)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_product_equals_the_loop(counts: list[int]) -> None:
    rows, weight = (
        torch.randn(sum(counts), 16).bfloat16(),
        torch.randn(len(counts), 24, 16).bfloat16(),
    )
    if reason := why_not_grouped_mm(rows, weight):
        pytest.skip(f"torch._grouped_mm: {reason}")
    exact = linear(rows.double(), weight.double(), counts, "loop")
    plain = linear(rows, weight, counts, "loop")
    found = linear(rows, weight, counts, "torch")
    for name, value, plain_value, exact_value in zip(
        ("output", "gradient of rows", "gradient of weight"), found, plain, exact, strict=True
    ):
        assert_as_good_as_plain(
            value, plain=plain_value, exact=exact_value, what=f"{counts}: {name}"
        )


@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_an_expert_without_rows_gets_gradient_zero(
    counts: list[int], backend: GroupedLinear
) -> None:
    rows, weight = (
        torch.randn(sum(counts), 16).bfloat16(),
        torch.randn(len(counts), 24, 16).bfloat16(),
    )
    if backend == "torch" and (reason := why_not_grouped_mm(rows, weight)):
        pytest.skip(f"torch._grouped_mm: {reason}")
    grad = linear(rows, weight, counts, backend)[2]
    for count, of_expert in zip(counts, grad, strict=True):
        assert bool(of_expert.any()) == bool(count)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_experts_are_swiglu_networks(counts: list[int]) -> None:
    num_experts, hidden_size, ffn_size = len(counts), 5, 7
    rows = torch.randn(sum(counts), hidden_size, dtype=torch.float64)
    fc1 = torch.randn(num_experts, 2 * ffn_size, hidden_size, dtype=torch.float64)
    fc2 = torch.randn(num_experts, hidden_size, ffn_size, dtype=torch.float64)
    found = run_experts(rows, torch.tensor(counts), fc1, fc2)
    expert = torch.arange(num_experts).repeat_interleave(torch.tensor(counts))
    gate_up = torch.einsum("nh,nfh->nf", rows, fc1[expert])
    gate, up = gate_up[:, :ffn_size], gate_up[:, ffn_size:]
    expected = torch.einsum("nf,nhf->nh", gate * torch.sigmoid(gate) * up, fc2[expert])
    torch.testing.assert_close(found, expected)


def test_what_the_grouped_product_cannot_do_is_said() -> None:
    rows, weight = torch.randn(4, 16), torch.randn(1, 8, 16)
    with pytest.raises(
        ValueError, match=r"bfloat16, the rows are torch.float32; use backend='loop'"
    ):
        grouped_linear(rows, weight, torch.tensor([4]), backend="torch")
    with pytest.raises(ValueError, match="7 elements of a row are no multiple of 16 bytes"):
        grouped_linear(
            rows[:, :7].bfloat16(), weight[..., :7].bfloat16(), torch.tensor([4]), backend="torch"
        )
    # Chosen automatically there is always a way.
    assert grouped_linear(rows[:, :7], weight[..., :7], torch.tensor([4])).shape == (4, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_product_equals_the_loop_on_a_gpu(counts: list[int]) -> None:
    rows = torch.randn(sum(counts), 64, device="cuda").bfloat16()
    weight = torch.randn(len(counts), 128, 64, device="cuda").bfloat16()
    if reason := why_not_grouped_mm(rows, weight):
        pytest.skip(f"torch._grouped_mm: {reason}")

    def on_gpu(dtype: torch.dtype, backend: GroupedLinear) -> list[Tensor]:
        leaves = [t.to(dtype).clone().requires_grad_() for t in (rows, weight)]
        on_device = torch.tensor(counts, device="cuda")
        output = grouped_linear(leaves[0], leaves[1], on_device, backend=backend)
        grad = torch.ones_like(output)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    for name, found, plain, exact in zip(
        ("output", "gradient of rows", "gradient of weight"),
        on_gpu(torch.bfloat16, "torch"),
        on_gpu(torch.bfloat16, "loop"),
        on_gpu(torch.float64, "loop"),
        strict=True,
    ):
        assert_as_good_as_plain(found, plain=plain, exact=exact, what=f"{counts}: {name}")
