"""Triton kernel of `merge_partial`: one pass over both outputs, one program for a token's heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernel_case import KernelCase, argument_types, on_all_targets

_MAX_HEADS = 16


@triton.jit  # type: ignore[untyped-decorator]
def merge_kernel(
    output: tl.tensor,
    log_sum_exp: tl.tensor,
    part_output: tl.tensor,
    part_log_sum_exp: tl.tensor,
    rows: tl.tensor,
    num_heads: tl.tensor,
    head_dim: tl.tensor,
    output_token_stride: tl.tensor,
    output_head_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    part_token_stride: tl.tensor,
    part_head_stride: tl.tensor,
    part_lse_head_stride: tl.tensor,
    HAS_ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    token = row
    if HAS_ROWS:
        token = tl.load(rows + row).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = head < num_heads
    lse_pointers = log_sum_exp + head * lse_head_stride + token
    old_lse = tl.load(lse_pointers, mask=is_head, other=0.0)
    new_lse = tl.load(
        part_log_sum_exp + head * part_lse_head_stride + row, mask=is_head, other=0.0
    ).to(tl.float32)
    # A part over no key: -inf - -inf has no value, so say what it comes to.
    is_part = new_lse > float("-inf")
    weight = tl.where(is_part, 1.0 / (1.0 + tl.exp(old_lse - new_lse)), 0.0)
    largest = tl.maximum(old_lse, new_lse)
    merged_lse = largest + tl.log(tl.exp(old_lse - largest) + tl.exp(new_lse - largest))
    tl.store(lse_pointers, tl.where(is_part, merged_lse, old_lse), mask=is_head)

    channel = tl.arange(0, CHANNELS)
    mask = is_head[:, None] & (channel < head_dim)[None, :]
    pointers = output + token * output_token_stride
    pointers += head[:, None] * output_head_stride + channel[None, :]
    part_pointers = part_output + row * part_token_stride
    part_pointers += head[:, None] * part_head_stride + channel[None, :]
    old = tl.load(pointers, mask=mask, other=0.0)
    new = tl.load(part_pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, old + weight[:, None] * (new - old), mask=mask)


def merge_partial_triton(
    output: Tensor,
    log_sum_exp: Tensor,
    part_output: Tensor,
    part_log_sum_exp: Tensor,
    *,
    rows: Tensor | None = None,
) -> None:
    """As `merge_partial`, for float32 `output` and `log_sum_exp`; channels and tokens of
    log-sum-exps lie side by side."""
    num_rows, num_heads, head_dim = part_output.shape
    if num_rows == 0:
        return
    assert output.dtype == log_sum_exp.dtype == torch.float32
    assert output.stride(2) == part_output.stride(2) == 1
    assert log_sum_exp.stride(1) == part_log_sum_exp.stride(1) == 1
    heads = min(_MAX_HEADS, triton.next_power_of_2(num_heads))
    merge_kernel[(num_rows, triton.cdiv(num_heads, heads))](
        output,
        log_sum_exp,
        part_output,
        part_log_sum_exp,
        rows if rows is not None else log_sum_exp,
        num_heads,
        head_dim,
        output.stride(0),
        output.stride(1),
        log_sum_exp.stride(0),
        part_output.stride(0),
        part_output.stride(1),
        part_log_sum_exp.stride(0),
        HAS_ROWS=rows is not None,
        HEADS=heads,
        CHANNELS=triton.next_power_of_2(head_dim),
    )


def kernel_cases() -> tuple[KernelCase, ...]:
    """The accumulated output travels in vectors of 16 bytes."""
    types = {
        **dict.fromkeys(("output", "log_sum_exp", "part_log_sum_exp"), "*fp32"),
        **{"part_output": "*bf16", "rows": "*i32"},
    }
    return (
        KernelCase(
            kernel=merge_kernel,
            signature=argument_types(merge_kernel, types),
            constants={"HAS_ROWS": True, "HEADS": _MAX_HEADS, "CHANNELS": 128},
            expects=on_all_targets(
                ptx=("ld.global.v4.b32", "st.global.v4.b32"),
                amdgcn=("global_load_dwordx4", "global_store_dwordx4"),
            ),
        ),
    )
