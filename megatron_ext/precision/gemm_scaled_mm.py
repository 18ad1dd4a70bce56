"""torch's own products of few bits, `torch.nn.functional.scaled_mm` (cuBLASLt on CUDA).

| formats | where |
|---|---|
| `fp8_tensor`, `fp8_row` | CPU; CUDA from sm_89 |
| `fp8_1x128` with itself or `fp8_128x128` | sm_90 |
| `mxfp8`, `nvfp4` | sm_100 and later |

CUDA takes no two E5M2 operands, and sizes that are multiples of 16. Scales are put in cuBLASLt's
order here: of 1 x 128 down the rows, of 128 x 128 with the contracted dim filled up to four blocks,
small blocks swizzled (`scale_swizzle.py`). Sums are exact to float32 as far as the library's are:
`use_fast_accum` is off. One scale for a tensor and one for a row may meet: both become rows'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.precision.block_format import BlockFormat
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.scale_swizzle import swizzled_scales

_MULTIPLE = 16
# Contracted blocks of 128 x 128 that cuBLASLt reads at once.
_BLOCKS_AT_ONCE = 4


def why_not_multiply(formats: tuple[BlockFormat, BlockFormat], device: torch.device) -> str:
    """Why torch does not multiply these on this device; empty where it does."""
    left, right = formats
    kinds = {_kind(left), _kind(right)}
    if None in kinds or len({_family(left), _family(right)}) > 1:
        return f"torch has no product of {left.name} with {right.name}"
    if device.type == "cpu":
        return "" if kinds == {"whole"} else "on CPUs torch multiplies fp8_tensor and fp8_row only"
    if torch.version.hip is not None:
        return "its formats on ROCm are not used here"
    if left.element.name == right.element.name == "e5m2":
        return "cuBLASLt multiplies no two E5M2 operands"
    if left.block_rows == right.block_rows == 128:
        return "cuBLASLt wants blocks of 1 x 128 on one side"
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    needs, in_words = {
        "whole": (capability >= 89, "sm_89 or later"),
        "blocks of 128": (major == 9, "sm_90"),
        "small blocks": (capability >= 100, "sm_100 or later"),
    }[str(kinds.pop())]
    return "" if needs else f"{left.name} needs {in_words}, and this is sm_{capability}"


def multiply_scaled_mm(
    left: Quantized,
    right: Quantized,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """left right^T: [m, k] x [n, k] -> [m, n]; added to `out` (float32) if there is one.

    Raises:
        ValueError: formats or sizes that torch does not multiply on this device.
    """
    if reason := why_not_multiply((left.block_format, right.block_format), left.codes.device):
        raise ValueError(reason)
    (rows, depth), (columns, right_depth) = left.shape, right.shape
    if depth != right_depth:
        raise ValueError(f"left has {depth} columns and right {right_depth}; both are contracted")
    if left.codes.is_cuda and (depth % _MULTIPLE or columns % _MULTIPLE):
        raise ValueError(
            f"cuBLASLt wants multiples of {_MULTIPLE}; the product is [{rows}, {depth}] by "
            f"[{columns}, {depth}]"
        )
    dtype = torch.float32 if out is not None else out_dtype
    product = prepared_scaled_mm(left, right, dtype)()
    return product if out is None else out.add_(product)


def prepared_scaled_mm(
    left: Quantized, right: Quantized, dtype: torch.dtype, *, uses_fast_accum: bool = False
) -> Callable[[], Tensor]:
    """The product alone, with operands and scales as the library reads them made before.

    Args:
        uses_fast_accum: let Hopper's tensor cores add all products with about 14 bits.
    """
    operands = _native(left), _native(right).t()
    if _kind(left.block_format) == "whole":
        # torch 2.11's scaled_mm of CPUs takes these by the older name only.
        scales = _whole_scales(left, right)

        def older() -> Tensor:
            product: Tensor = torch._scaled_mm(
                *operands,
                scale_a=scales[0],
                scale_b=scales[1],
                out_dtype=dtype,
                use_fast_accum=uses_fast_accum,
            )
            return product

        return older
    recipes = _recipe(left), _recipe(right)
    scaled_mm: Any = F.scaled_mm

    def newer() -> Tensor:
        product: Tensor = scaled_mm(
            *operands,
            scale_a=recipes[0][0],
            scale_recipe_a=recipes[0][1],
            swizzle_a=recipes[0][2],
            scale_b=recipes[1][0],
            scale_recipe_b=recipes[1][1],
            swizzle_b=recipes[1][2],
            output_dtype=dtype,
            use_fast_accum=uses_fast_accum,
        )
        return product

    return newer


def _kind(block_format: BlockFormat) -> str | None:
    """What scales belong to; None: nothing torch knows."""
    if block_format.block_columns is None:
        return "whole"
    if block_format.scale == "fp32":
        return "blocks of 128"
    # Its MXFP4 needs a library that torch's wheels do not have.
    return None if block_format.name == "mxfp4" else "small blocks"


def _family(block_format: BlockFormat) -> tuple[str | None, int]:
    return _kind(block_format), block_format.element.bits


def _native(stored: Quantized) -> Tensor:
    name = stored.block_format.element.native or "float4_e2m1fn_x2"
    codes: Tensor = stored.codes.contiguous().view(getattr(torch, name))
    return codes


def _whole_scales(left: Quantized, right: Quantized) -> tuple[Tensor, Tensor]:
    """One for each tensor, or [m, 1] and [1, n]."""
    if left.block_format.block_rows is right.block_format.block_rows is None:
        return left.scales.reshape(()), right.scales.reshape(())
    rows, columns = len(left.codes), len(right.codes)
    return (
        left.scales.expand(rows, 1).contiguous(),
        right.scales.expand(columns, 1).reshape(1, columns).contiguous(),
    )


def _recipe(stored: Quantized) -> tuple[list[Tensor], list[Any], list[Any]]:
    """Scales as cuBLASLt reads them, what they are, and their order."""
    functional: Any = F
    kinds, orders = functional.ScalingType, functional.SwizzleType
    block_format = stored.block_format
    if block_format.scale == "fp32":
        if block_format.block_rows == 1:
            return [down_the_rows(stored.scales)], [kinds.BlockWise1x128], [orders.NO_SWIZZLE]
        return [filled_blocks(stored.scales)], [kinds.BlockWise128x128], [orders.NO_SWIZZLE]
    scales = small_scales(stored)
    if block_format.scale == "e8m0":
        codes = scales.view(torch.float8_e8m0fnu)
        return [codes], [kinds.BlockWise1x32], [orders.SWIZZLE_32_4_4]
    assert stored.tensor_scale is not None
    return (
        [scales.view(torch.float8_e4m3fn), stored.tensor_scale],
        [kinds.BlockWise1x16, kinds.TensorWise],
        [orders.SWIZZLE_32_4_4, orders.NO_SWIZZLE],
    )


def down_the_rows(scales: Tensor) -> Tensor:
    """Of blocks of 1 x 128: float32 [rows, across], the same with strides (1, rows)."""
    # Said in strides: of one row torch would take any for contiguous, and its product would not.
    rows, across = scales.shape
    turned = torch.empty_strided(
        (rows, across), (1, rows), dtype=scales.dtype, device=scales.device
    )
    return turned.copy_(scales)


def filled_blocks(scales: Tensor) -> Tensor:
    """Of blocks of 128 x 128: float32 [down, across] -> [across to four, down] by columns."""
    return F.pad(scales, (0, -scales.shape[1] % _BLOCKS_AT_ONCE)).t()


def small_scales(stored: Quantized) -> Tensor:
    """Of blocks of 16 or 32 columns: uint8, swizzled and flat; of 16 x 16 once for every row."""
    scales, block_rows = stored.scales, stored.block_format.block_rows or 1
    if block_rows > 1:
        scales = scales.repeat_interleave(block_rows, dim=0)[: len(stored.codes)]
    return swizzled_scales(scales).flatten()
