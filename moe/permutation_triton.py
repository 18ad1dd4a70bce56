"""Triton kernels of the permutation: each reads and writes every row once.

One program for a row, so that a gather of rows and the sum over a list of rows are one pass; the
gradient of the weighted sum makes both of its results from one reading of both inputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernel_case import KernelCase, argument_types, on_all_targets

_MAX_BLOCK = 4096
_ELEMENTS_PER_WARP = 256


@triton.jit  # type: ignore[untyped-decorator]
def gather_rows_kernel(
    rows: tl.tensor,
    sources: tl.tensor,
    gathered: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(sources + row).to(tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < width
        value = tl.load(rows + source * width + column, mask=mask)
        tl.store(gathered + row * width + column, value, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def segment_sum_kernel(
    rows: tl.tensor,
    chosen: tl.tensor,
    starts: tl.tensor,
    weights: tl.tensor,
    total: tl.tensor,
    width: tl.tensor,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    output = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    first = tl.load(starts + output)
    last = tl.load(starts + output + 1)
    added = tl.zeros([BLOCK], dtype=tl.float32)
    for place in range(first, last):
        source = tl.load(chosen + place).to(tl.int64)
        value = tl.load(rows + source * width + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value *= tl.load(weights + place).to(tl.float32)
        added += value
    tl.store(total + output * width + column, added, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def weighted_gather_kernel(
    grads: tl.tensor,
    sources: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    grad_rows: tl.tensor,
    grad_weights: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(sources + row).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    product = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < width
        grad = tl.load(grads + source * width + column, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(rows + row * width + column, mask=mask, other=0.0).to(tl.float32)
        product += grad * value
        tl.store(grad_rows + row * width + column, weight * grad, mask=mask)
    tl.store(grad_weights + row, tl.sum(product, axis=0))


def gather_rows_triton(rows: Tensor, sources: Tensor) -> Tensor:
    """rows[sources]: [num_rows, width] and int64 [num_gathered] to [num_gathered, width]."""
    rows = rows.contiguous()
    gathered = rows.new_empty(sources.numel(), rows.shape[1])
    if gathered.numel():
        block, num_warps = _block(rows.shape[1])
        gather_rows_kernel[(sources.numel(),)](
            rows, sources, gathered, rows.shape[1], BLOCK=block, num_warps=num_warps
        )
    return gathered


def segment_sum_triton(
    rows: Tensor, chosen: Tensor, starts: Tensor, weights: Tensor | None = None
) -> Tensor:
    """As `moe.segment_sum.segment_sum`, for float32 rows and narrower ones."""
    num_outputs, width = starts.numel() - 1, rows.shape[1]
    total = rows.new_empty(num_outputs, width)
    if total.numel():
        block, num_warps = _block(width)
        segment_sum_kernel[(num_outputs, triton.cdiv(width, block))](
            rows.contiguous(),
            chosen,
            starts,
            rows if weights is None else weights.contiguous(),
            total,
            width,
            HAS_WEIGHTS=weights is not None,
            BLOCK=block,
            num_warps=num_warps,
        )
    return total


def weighted_gather_triton(
    grads: Tensor, sources: Tensor, weights: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of a weighted sum: of its rows and of their weights.

    Args:
        grads: [num_tokens, width], of the sums.
        sources: int64 [num_rows], the sum that each row is part of.
        weights: [num_rows].
        rows: [num_rows, width].

    Returns:
        (weights[r] grads[sources[r]] in the dtype of `rows`; float32 [num_rows], their products
        with the rows.)
    """
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    grad_weights = rows.new_zeros(rows.shape[0], dtype=torch.float32)
    if grad_rows.numel():
        block, num_warps = _block(rows.shape[1])
        weighted_gather_kernel[(rows.shape[0],)](
            grads.contiguous(),
            sources,
            weights.contiguous(),
            rows.contiguous(),
            grad_rows,
            grad_weights,
            rows.shape[1],
            BLOCK=block,
            num_warps=num_warps,
        )
    return grad_rows, grad_weights


def _block(width: int) -> tuple[int, int]:
    """Columns that a program takes at once, and its warps."""
    block = min(_MAX_BLOCK, triton.next_power_of_2(width))
    return block, max(1, min(8, block // _ELEMENTS_PER_WARP))


def kernel_cases() -> tuple[KernelCase, ...]:
    """bfloat16 rows travel in vectors of 16 bytes."""
    block, num_warps = _block(_MAX_BLOCK)
    types = {
        **dict.fromkeys(("rows", "gathered", "total", "grads", "grad_rows"), "*bf16"),
        **dict.fromkeys(("weights", "grad_weights"), "*fp32"),
        **dict.fromkeys(("sources", "chosen", "starts"), "*i64"),
    }
    vectors = on_all_targets(
        ptx=("ld.global.v4.b32", "st.global.v4.b32"),
        amdgcn=("global_load_dwordx4", "global_store_dwordx4"),
    )
    kernels: tuple[tuple[Any, dict[str, Any]], ...] = (
        (gather_rows_kernel, {}),
        (segment_sum_kernel, {"HAS_WEIGHTS": True}),
        (weighted_gather_kernel, {}),
    )
    return tuple(
        KernelCase(
            kernel=kernel,
            signature=argument_types(kernel, types),
            constants={"BLOCK": block, **constants},
            expects=vectors,
            num_warps=num_warps,
        )
        for kernel, constants in kernels
    )
