"""torch's own products: on CPUs against the definition, and the order of scales cuBLASLt wants."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.precision.block_format import BLOCK_FORMATS
from megatron_ext.precision.gemm_scaled_mm import (
    down_the_rows,
    filled_blocks,
    multiply_scaled_mm,
    small_scales,
    why_not_multiply,
)
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.reference import quantize
from megatron_ext.precision.scale_swizzle import unswizzled_scales

CPU = torch.device("cpu")
WHOLE = [name for name in BLOCK_FORMATS if name.startswith(("fp8_tensor", "fp8_row"))]


def stored(name: str, rows: int, columns: int, device: str = "cpu") -> Quantized:
    return quantize(torch.randn(rows, columns, device=device), Quantizer(BLOCK_FORMATS[name]))


def check_close(found: torch.Tensor, left: Quantized, right: Quantized) -> None:
    """Float32 sums of K products err by less than (K + 8) 2^-24 of the sum of magnitudes; Hopper's
    FP8 instructions cut each of 33 addends 13 bits below the largest, four times in 128 columns."""
    a, b = left.values().double(), right.values().double()
    exact, sizes = a @ b.t(), a.abs() @ b.abs().t()
    error = (a.shape[1] + 8) * 2.0**-24 + (4 * 33 * 2.0**-13 if found.is_cuda else 0.0)
    assert bool(((found.double() - exact).abs() <= error * sizes).all())


@pytest.mark.parametrize("left_name", WHOLE)
@pytest.mark.parametrize("right_name", WHOLE)
@pytest.mark.parametrize("shape", [(1, 1, 16), (37, 13, 101), (32, 48, 128)])
def test_on_a_cpu_it_is_the_definition(
    left_name: str, right_name: str, shape: tuple[int, int, int]
) -> None:
    rows, columns, depth = shape
    left, right = stored(left_name, rows, depth), stored(right_name, columns, depth)
    check_close(multiply_scaled_mm(left, right), left, right)
    before = torch.randn(rows, columns)
    out = before.clone()
    assert multiply_scaled_mm(left, right, out=out) is out
    assert torch.equal(out, before + multiply_scaled_mm(left, right))
    assert multiply_scaled_mm(left, right, out_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_torch_does_not_multiply_is_refused_with_a_reason() -> None:
    for names, reason in (
        (("mxfp8", "mxfp8"), "on CPUs torch multiplies fp8_tensor and fp8_row only"),
        (("fp8_1x128", "fp8_128x128"), "on CPUs"),
        (("mxfp4", "mxfp4"), "torch has no product of mxfp4 with mxfp4"),
        (("fp8_row", "fp8_1x128"), "torch has no product of fp8_row with fp8_1x128"),
    ):
        left, right = (BLOCK_FORMATS[name] for name in names)
        assert why_not_multiply((left, right), CPU).startswith(reason)
        with pytest.raises(ValueError, match=reason):
            multiply_scaled_mm(stored(names[0], 4, 128), stored(names[1], 4, 128))
    with pytest.raises(ValueError, match="left has 32 columns and right 64"):
        multiply_scaled_mm(stored("fp8_row", 4, 32), stored("fp8_row", 4, 64))


def test_scales_are_ordered_as_cublaslt_reads_them() -> None:
    rows = stored("fp8_1x128", 5, 700)
    turned = down_the_rows(rows.scales)
    assert torch.equal(turned, rows.scales)
    assert turned.stride() == (1, 5)
    # cuBLASLt's checks read the strides of a single row, too.
    assert down_the_rows(stored("fp8_1x128", 1, 700).scales).stride() == (1, 1)
    blocks = stored("fp8_128x128", 300, 700)
    filled = filled_blocks(blocks.scales)
    # Six blocks across become eight.
    assert filled.shape == (8, 3)
    assert filled.stride() == (1, 8)
    assert torch.equal(filled[:6], blocks.scales.t())
    square = stored("nvfp4_2d", 40, 64)
    spread = unswizzled_scales(small_scales(square).view(1, 1, 512), 40, 4)
    assert torch.equal(spread, square.scales[torch.arange(40) // 16])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize(
    "names",
    [
        ("fp8_tensor", "fp8_tensor_e5m2"),
        ("fp8_row", "fp8_row"),
        ("fp8_1x128", "fp8_128x128"),
        ("fp8_1x128", "fp8_1x128"),
        ("mxfp8", "mxfp8"),
        ("nvfp4", "nvfp4_2d"),
    ],
)
def test_on_a_device_it_is_close_to_the_definition(names: tuple[str, str]) -> None:
    left, right = (BLOCK_FORMATS[name] for name in names)
    if reason := why_not_multiply((left, right), torch.device("cuda")):
        pytest.skip(reason)
    operands = stored(names[0], 256, 512, "cuda"), stored(names[1], 384, 512, "cuda")
    check_close(multiply_scaled_mm(*operands, out_dtype=torch.float32), *operands)
