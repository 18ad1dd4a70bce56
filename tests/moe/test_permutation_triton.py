"""The Triton kernels of the permutation: interpreted on the CPU, compiled for GPUs, run on one.

Triton decides when it is imported whether it interprets, so that part runs in a process of its own
(this file as a program).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe.permutation import order_by_expert, permute, unpermute
from moe.segment_sum import segment_sum
from tests.moe.routed_case import RoutedCase, routing_of

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

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
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == f"{len(CASES)} cases"


# (backend, architecture, threads of a warp, text form, how it loads and stores 16 bytes at once)
TARGETS = [
    ("cuda", 90, 32, "ptx", ("ld.global.v4.b32", "st.global.v4.b32")),
    ("hip", "gfx90a", 64, "amdgcn", ("global_load_dwordx4", "global_store_dwordx4")),
]


@needs_triton
@pytest.mark.parametrize(("backend", "architecture", "warp_size", "text", "vectors"), TARGETS)
def test_kernels_compile_ahead_of_time(
    backend: str,
    architecture: int | str,
    warp_size: int,
    text: str,
    vectors: tuple[str, str],
) -> None:
    """For GPUs that are not here; bfloat16 rows travel in vectors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe import permutation_triton as kernels

    target = GPUTarget(backend, architecture, warp_size)
    lists = dict.fromkeys(("sources", "chosen", "starts"), "*i64")
    types = {
        **dict.fromkeys(("rows", "gathered", "total", "grads", "grad_rows"), "*bf16"),
        **dict.fromkeys(("weights", "grad_weights"), "*fp32"),
        **lists,
        **{"width": "i32", "BLOCK": "constexpr", "HAS_WEIGHTS": "constexpr"},
    }
    for kernel in (
        kernels.gather_rows_kernel,
        kernels.segment_sum_kernel,
        kernels.weighted_gather_kernel,
    ):
        names = kernel.arg_names
        constants = {"BLOCK": 2048, "HAS_WEIGHTS": True}
        source = ASTSource(
            kernel,
            {name: types[name] for name in names},
            constexprs={name: constants[name] for name in names if name in constants},
            # Pointers and sizes are multiples of 16, as with real widths.
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(names)
                if name not in constants
            },
        )
        compiled = triton.compile(source, target=target, options={"num_warps": 8 * 32 // warp_size})
        for operation in vectors:
            assert operation in compiled.asm[text], f"{kernel.__name__} for {architecture}"


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
