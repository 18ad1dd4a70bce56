"""The Triton kernels of the permutation: interpreted on the CPU, and run on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.permutation import order_by_expert, permute, unpermute
from moe.segment_sum import segment_sum
from tests.moe.routed_case import RoutedCase, routing_of
from tests.triton_process import needs_triton, run_interpreted

# The interpreter takes a millisecond an operation. 5,000 columns are more than one block.
CASES = (
    RoutedCase(5, 4, 2, hidden_size=7),
    RoutedCase(6, 4, 3, hidden_size=16, dropped_share=0.5),
    RoutedCase(3, 4, 1, hidden_size=5_000, choice="all to one"),
    RoutedCase(2, 2, 2, hidden_size=1, dropped_share=1.0),
    RoutedCase(0, 2, 2, hidden_size=4),
)


def check_kernels(device: str, dtype: torch.dtype, cases: tuple[RoutedCase, ...] = CASES) -> None:
    from moe.permutation_triton import (
        gather_rows_triton,
        segment_sum_triton,
        weighted_gather_triton,
    )

    for case in cases:
        tokens, weights = (leaf.to(device) for leaf in case.leaves(dtype)[:2])
        weights = weights.float()
        routing = routing_of(case.experts().to(device), weights, num_experts=case.num_experts)
        permutation = order_by_expert(routing.experts, num_rows=routing.num_rows())
        rows = gather_rows_triton(tokens, permutation.sources)
        assert torch.equal(rows, tokens[permutation.sources])
        chosen, starts = permutation.lists()
        of_place = weights.reshape(-1)[permutation.choices]
        for factors in (None, of_place[chosen]):
            total = segment_sum_triton(rows, chosen, starts, factors)
            exact = segment_sum(
                rows.double().cpu(),
                chosen.cpu(),
                starts.cpu(),
                None if factors is None else factors.double().cpu(),
            )
            close(total, exact, dtype)
        grads = torch.randn(tokens.shape, device=device).to(dtype)
        grad_rows, grad_weights = weighted_gather_triton(grads, permutation.sources, of_place, rows)
        of_row = grads[permutation.sources].double().cpu()
        close(grad_rows, of_place.double().cpu()[:, None] * of_row, dtype)
        close(grad_weights, (of_row * rows.double().cpu()).sum(dim=1), torch.float32)
        assert grad_weights.dtype == torch.float32


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Float32 inside: one rounding of each product and sum, and one to the result's dtype."""
    rounding = torch.finfo(dtype).eps + 1e-5
    size = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(found.double().cpu(), exact, rtol=rounding, atol=1e-5 * size)


@needs_triton
def test_interpreted_kernels_equal_the_definition() -> None:
    assert run_interpreted(__file__).strip() == f"{len(CASES)} cases"


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    check_kernels("cuda", dtype, (*CASES, RoutedCase(3000, 16, 4, hidden_size=2048)))


@pytest.mark.gpu
@needs_triton
def test_permutation_on_a_gpu_equals_the_cpu() -> None:
    case = RoutedCase(300, 16, 4, hidden_size=64, dropped_share=0.2)

    def parts(device: str) -> list[Tensor]:
        tokens, weights = (
            leaf.to(device).requires_grad_() for leaf in case.leaves(torch.float32)[:2]
        )
        routing = routing_of(case.experts().to(device), weights, num_experts=case.num_experts)
        permutation = order_by_expert(routing.experts, num_rows=routing.num_rows())
        output = unpermute(permute(tokens, permutation), weights, permutation)
        grad = case.grad(torch.float32).to(device)
        return [
            part.cpu()
            for part in (output.detach(), *torch.autograd.grad(output, [tokens, weights], grad))
        ]

    for found, expected in zip(parts("cuda"), parts("cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16):
        check_kernels("cpu", dtype)
    print(f"{len(CASES)} cases")
