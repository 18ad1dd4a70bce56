"""Products of matrices of few bits by the CUDA kernels of csrc/gemm: out = left right^T.

    out[m, n] = f g sum_b s[m, b] t[n, b] sum_{k in block b} decode(left[m, k]) decode(right[n, k])

s and t are scales of blocks, f and g the tensors' own. The inner sum is the tensor core's; on sm_90
it ends after 128 products and is added in float32 (DeepSeek-V3, section 3.3.2). Sums are made in
another order than the definition's, as in `gemm_triton.py`.

`gemm_cuda_plan.py` says which formats and sizes there are kernels for. Compiled for their devices
and never run on one: not measured on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.precision.block_format import BlockFormat
from megatron_ext.precision.cuda_extension import cuda_ops, why_no_cuda_extension
from megatron_ext.precision.gemm_cuda_plan import (
    DEPTH_ALIGNMENT,
    CudaProduct,
    check_sizes,
    family_of,
    kernel_of,
    takes_tall_tiles,
    why_not_on,
)
from megatron_ext.precision.grouped_quantized import GroupedQuantized
from megatron_ext.precision.quantized import Quantized

Formats = tuple[BlockFormat, BlockFormat]


def why_not_multiply(formats: Formats, device: torch.device) -> str:
    """Why no kernel multiplies the two formats on a device; empty where one does."""
    return why_no_cuda_extension() or why_not_on(*formats, _capability(device), is_grouped=False)


def why_not_grouped_multiply(formats: Formats, device: torch.device) -> str:
    """Likewise for experts."""
    return why_no_cuda_extension() or why_not_on(*formats, _capability(device), is_grouped=True)


def multiply_cuda(
    left: Quantized,
    right: Quantized,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """left right^T: [m, k] x [n, k] -> [m, n].

    Args:
        out_dtype: float32 or bfloat16; float32 where `out` is given.
        out: float32 [m, n], to which the product is added.

    Raises:
        ValueError: formats, sizes or alignments that no kernel takes; they are named.
        RuntimeError: the extension is not there, with the reason.
    """
    (rows, depth), (columns, right_depth) = left.shape, right.shape
    if depth != right_depth:
        raise ValueError(f"left has {depth} columns and right {right_depth}; both are contracted")
    device = left.codes.device
    family = _family(left.block_format, right.block_format)
    # The wgrad kernel writes float32 alone.
    dtype = torch.float32 if family == "fp8_rows" else _checked_dtype(out_dtype)
    result = _checked_out(out, (rows, columns), dtype, device)
    check_sizes(left.block_format, depth, columns, result.element_size())
    if not result.numel() or not depth:
        return result if out is not None else result.zero_()
    ops = cuda_ops()
    capability = _capability(device)
    if reason := why_not_on(left.block_format, right.block_format, capability, is_grouped=False):
        raise ValueError(reason)
    is_tall = takes_tall_tiles(rows, columns, _num_multiprocessors(device))
    product = CudaProduct(
        kernel_of(family, capability, is_tall=is_tall),
        rows,
        columns,
        depth,
        left.block_format.block_rows or 1,
        right.block_format.block_rows or 1,
    )
    ops.multiply(
        result,
        *_tensors(left),
        *_tensors(right),
        _alpha(left.tensor_scale, right.tensor_scale),
        None,
        product.numbers(),
        out is not None,
    )
    return result if out is not None else result.to(out_dtype)


def grouped_multiply_cuda(
    left: GroupedQuantized,
    right: GroupedQuantized,
    starts: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    alignment: int = 1,
) -> Tensor:
    """One product for each expert; arguments as `grouped_gemm_triton.py` has them.

    Args:
        left, right: `rows` [T, K] in 1 x 128 and `stacked` [E, N, K] in 128 x 128, or both
            `columns`, [M, T] and [N, T], in 1 x 128.
        starts: int32 or int64 [E + 1] on the device; the host does not wait for it.
        alignment: the caller's word that every start is a multiple of it; `columns` need 128.

    Returns:
        [T, N] or [E, M, N]; an expert without tokens gets zeros there (or `out` unchanged).

    Raises:
        ValueError, RuntimeError: as `multiply_cuda`.
    """
    product, shape = _grouped_product(left, right, starts.numel() - 1, alignment)
    device = left.codes.device
    is_depth = left.layout == "columns"
    dtype = torch.float32 if is_depth else _checked_dtype(out_dtype)
    result = _checked_out(out, shape, dtype, device)
    check_sizes(left.block_format, product.depth, product.columns, result.element_size())
    if is_depth and out is None:
        # Experts without tokens are not written, and the kernel adds.
        result.zero_()
    if not result.numel() or not product.depth:
        return result if out is not None else result.zero_().to(out_dtype)
    ops = cuda_ops()
    if reason := why_not_on(
        left.block_format, right.block_format, _capability(device), is_grouped=True
    ):
        raise ValueError(reason)
    ops.multiply(
        result,
        *_tensors(left),
        *_tensors(right),
        None,
        starts.to(torch.int32).contiguous(),
        product.numbers(),
        is_depth or out is not None,
    )
    return result if out is not None else result.to(out_dtype)


def _grouped_product(
    left: GroupedQuantized, right: GroupedQuantized, num_groups: int, alignment: int
) -> tuple[CudaProduct, tuple[int, ...]]:
    """And the result's shape."""
    family = _family(left.block_format, right.block_format)
    if not family.startswith("fp8"):
        raise ValueError(f"there is no CUDA kernel for experts in {family}")
    if left.tensor_scale is not None or right.tensor_scale is not None:
        raise ValueError("CUDA products of experts have no scales of whole tensors")
    if (left.layout, right.layout, family) == ("rows", "stacked", "fp8"):
        (rows, depth), (num_experts, columns, right_depth) = left.shape, right.shape
        if depth != right_depth or num_experts != num_groups:
            raise ValueError(
                f"rows of {depth} columns of {num_groups} experts do not go with weights "
                f"{list(right.shape)}"
            )
        return CudaProduct("fp8_tall", rows, columns, depth, 1, 128), (rows, columns)
    if (left.layout, right.layout, family) == ("columns", "columns", "fp8_rows"):
        (rows, depth), (columns, right_depth) = left.shape, right.shape
        if depth != right_depth:
            raise ValueError(
                f"left has {depth} tokens and right {right_depth}; both are contracted"
            )
        if alignment % DEPTH_ALIGNMENT:
            raise ValueError(
                f"experts' tokens must start at multiples of {DEPTH_ALIGNMENT}, the block along "
                f"them; alignment says {alignment}"
            )
        return CudaProduct("fp8_rows", rows, columns, depth), (num_groups, rows, columns)
    raise ValueError(
        f"no CUDA product of {left.layout} in {left.block_format.name} with {right.layout} in "
        f"{right.block_format.name}; there are rows in fp8_1x128 with stacked in fp8_128x128, and "
        "columns with columns in fp8_1x128"
    )


def _family(left: BlockFormat, right: BlockFormat) -> str:
    family = family_of(left, right)
    if family is None:
        raise ValueError(f"no CUDA kernel multiplies {left.name} by {right.name}")
    return family


def _tensors(stored: Quantized | GroupedQuantized) -> tuple[Tensor, Tensor]:
    """Codes and scales as one run of memory, at a multiple of 16 bytes as the copy engine reads."""
    codes, scales = stored.codes.contiguous(), stored.scales.contiguous()
    return (
        codes if codes.data_ptr() % 16 == 0 else codes.clone(),
        scales if scales.data_ptr() % 16 == 0 else scales.clone(),
    )


def _alpha(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Product of the tensors' scales, float32 []."""
    if left is None or right is None:
        return left if right is None else right
    return left * right


def _checked_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"CUDA products are float32 or bfloat16; {dtype} was asked for")
    return dtype


def _checked_out(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`out`, or a new matrix. ValueError: another shape or dtype, strided, or not aligned."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(out.shape) != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"products are added to a contiguous float32 {list(shape)}; out is {out.dtype} "
            f"{list(out.shape)} with strides {list(out.stride())}"
        )
    if out.data_ptr() % 16:
        raise ValueError("out must begin at a multiple of 16 bytes for the CUDA kernels")
    return out


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
