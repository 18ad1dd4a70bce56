"""Triton kernels of `softmax_cross_entropy`: one online pass over a row, one in-place pass.

The first keeps a running maximum m and, for each of `BLOCK` lanes, a running sum of exp(x - m),
which is scaled by exp(m_old - m_new) whenever m grows (Milakov and Gimelshein, arXiv 1805.02867):
each logit is read once. The second overwrites each logit by its gradient. Both compute in float32
whatever the logits are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernel_case import KernelCase, argument_types, on_all_targets

_MAX_BLOCK = 8192
_NUM_WARPS = 16


@triton.jit  # type: ignore[untyped-decorator]
def row_sums_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    maxima: tl.tensor,
    exp_sums: tl.tensor,
    targets: tl.tensor,
    vocab_size: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    lanes = tl.arange(0, BLOCK)
    maximum = float("-inf")
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        x = tl.load(logits + columns, mask=columns < vocab_size, other=float("-inf"))
        x = x.to(tl.float32)
        new_maximum = tl.maximum(maximum, tl.max(x, axis=0))
        sums = sums * tl.exp(maximum - new_maximum) + tl.exp(x - new_maximum)
        maximum = new_maximum
    label = tl.load(labels + row)
    is_own = (label >= 0) & (label < vocab_size)
    target = tl.load(logits + label, mask=is_own, other=0.0).to(tl.float32)
    tl.store(maxima + row, maximum)
    tl.store(exp_sums + row, tl.sum(sums, axis=0))
    tl.store(targets + row, target)


@triton.jit  # type: ignore[untyped-decorator]
def gradient_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    maxima: tl.tensor,
    scales: tl.tensor,
    token_weights: tl.tensor,
    vocab_size: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pointers = logits + row * row_stride + columns
    mask = columns < vocab_size
    x = tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(x - tl.load(maxima + row)) * tl.load(scales + row)
    weight = tl.load(token_weights + row)
    gradient -= tl.where(columns == tl.load(labels + row), weight, 0.0)
    tl.store(pointers, gradient.to(logits.dtype.element_ty), mask=mask)


def row_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exp(logit - maximum) and the label's logit of every row.

    logits: [num_rows, vocab_size] with unit stride in a row; labels: int64 [num_rows], those
    outside the columns give 0. Returns three float32 [num_rows].
    """
    num_rows, vocab_size = logits.shape
    sums = torch.empty(3, num_rows, dtype=torch.float32, device=logits.device)
    row_sums_kernel[(num_rows,)](
        logits,
        labels,
        *sums.unbind(),
        vocab_size,
        logits.stride(0),
        BLOCK=_block(vocab_size),
        num_warps=_NUM_WARPS,
    )
    return sums[0], sums[1], sums[2]


def gradient_(
    logits: Tensor, labels: Tensor, *, maximum: Tensor, scale: Tensor, token_weights: Tensor
) -> None:
    """logits become scale * exp(logits - maximum) - token_weights * [column == label].

    maximum, scale, token_weights: float32 [num_rows].
    """
    num_rows, vocab_size = logits.shape
    block = _block(vocab_size)
    gradient_kernel[(num_rows, -(-vocab_size // block))](
        logits,
        labels,
        maximum,
        scale,
        token_weights,
        vocab_size,
        logits.stride(0),
        BLOCK=block,
        num_warps=_NUM_WARPS,
    )


def _block(vocab_size: int) -> int:
    return min(_MAX_BLOCK, 1 << (vocab_size - 1).bit_length())


def kernel_cases() -> tuple[KernelCase, ...]:
    """bfloat16 logits travel in vectors of 16 bytes."""
    types = {
        **dict.fromkeys(("maxima", "exp_sums", "targets", "scales", "token_weights"), "*fp32"),
        **{"logits": "*bf16", "labels": "*i64"},
    }
    loads = on_all_targets(ptx=("ld.global.v4.b32",), amdgcn=("global_load_dwordx4",))
    stores = on_all_targets(ptx=("st.global.v4.b32",), amdgcn=("global_store_dwordx4",))
    both = {target: loads[target] + stores[target] for target in loads}
    return tuple(
        KernelCase(
            kernel=kernel,
            signature=argument_types(kernel, types),
            constants={"BLOCK": _MAX_BLOCK},
            expects=expects,
            num_warps=_NUM_WARPS,
        )
        for kernel, expects in ((row_sums_kernel, loads), (gradient_kernel, both))
    )
