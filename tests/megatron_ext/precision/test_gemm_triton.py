"""The Triton products against the definition: interpreted, compiled for GPUs, and run on one.

Where all products and sums are whole numbers below 2^24 both are exact and equal; elsewhere they
differ by the order of float32 sums, for which there is a bound.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from megatron_ext.precision.block_format import BLOCK_FORMATS
from megatron_ext.precision.gemm_config import GemmPlan, Target, candidates, kind_of, plan_of
from megatron_ext.precision.grouped_quantized import GroupedQuantized, Layout, joined
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.reference import multiply, quantize, read
from tests.triton_process import needs_triton, run_interpreted

PAIRS = (
    ("fp8_tensor", "fp8_tensor_e5m2"),
    ("fp8_tensor_e5m2", "fp8_row"),
    ("fp8_row", "fp8_row_e5m2"),
    ("fp8_1x128", "fp8_128x128"),
    ("fp8_1x128", "fp8_1x128"),
    ("fp8_128x128", "fp8_1x128"),
    ("fp8_128x128", "fp8_128x128"),
    ("mxfp8", "mxfp8_e5m2"),
    ("mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4_2d"),
    ("nvfp4", "nvfp4"),
)
# One, primes, several tiles; the last has no whole block of FP8 and one row.
SIZES = ((131, 139, 160), (1, 1, 32), (7, 257, 288), (1, 17, 416))
# Rows of each expert: none, one, a prime, more than a tile; all to one.
COUNTS = ((0, 1, 37, 0, 131), (0, 0, 140), (0, 0))
GROUPED_PAIRS = (
    ("fp8_tensor", "fp8_tensor"),
    ("fp8_row", "fp8_row"),
    ("fp8_1x128", "fp8_128x128"),
    ("mxfp8", "mxfp8"),
    ("mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4_2d"),
)
WGRAD_PAIRS = tuple(
    (name, name) for name in ("fp8_tensor", "fp8_row", "fp8_1x128", "mxfp8", "mxfp4", "nvfp4")
)


def stored(name: str, rows: int, columns: int, device: str, *, whole: bool = False) -> Quantized:
    """Random, or whole numbers of up to 6 with scales that are whole or powers of two."""
    quantizer = Quantizer(BLOCK_FORMATS[name], power_of_two_scales=True)
    if not whole:
        quantizer = replace(quantizer, power_of_two_scales=False)
        return quantize(torch.randn(rows, columns, device=device), quantizer)
    values = torch.randint(-3, 4, (rows, columns), device=device).float()
    return quantize(values, quantizer)


def plans(left: str, device: str) -> list[GemmPlan]:
    """On a device the table's; interpreted also what devices do: two parts, TMA, decoding."""
    if device != "cpu":
        from megatron_ext.precision.gemm_launch_triton import current_target

        return candidates(BLOCK_FORMATS[left], current_target())
    base = plan_of(BLOCK_FORMATS[left], Target("interpreter", ""))
    two_parts = replace(base.tile, rows=128, parts=2)
    fetched = replace(base, uses_tma=True, swizzles=base.kind == "native", tile=two_parts)
    if base.kind == "blockwise":
        return [base, fetched, replace(base, decodes=True)]
    return [base, fetched, replace(base, kind="emulated", tile=replace(base.tile, depth=64))]


def check_close(found: Tensor, left: Quantized, right: Quantized, added: Tensor | None) -> None:
    """Against float64. A float32 sum of K products, each of three roundings, errs by less than
    (K + 8) 2^-24 of the sum of magnitudes (Higham, Accuracy and Stability, section 3.1). Hopper's
    FP8 instructions cut each of 33 addends 13 bits below the largest, four times in 128 columns."""
    a, b = read(left).double(), read(right).double()
    exact, sizes = a @ b.t(), a.abs() @ b.abs().t()
    if added is not None:
        exact, sizes = exact + added.double(), sizes + added.double().abs()
    share = (a.shape[1] + 8) * 2.0**-24
    if found.is_cuda and left.block_format.element.bits == 8:
        share += 4 * 33 * 2.0**-13
    bound = share * sizes
    if found.dtype == torch.bfloat16:
        # Half a step; the interpreter cuts off, so a whole one.
        bound = bound + 2.0 ** (-8 if found.is_cuda else -7) * exact.abs()
    assert bool(((found.double() - exact).abs() <= bound).all())


def check_products(device: str, sizes: tuple[tuple[int, int, int], ...] = SIZES) -> None:
    from megatron_ext.precision.gemm_triton import multiply_triton

    for place, (left_name, right_name) in enumerate(PAIRS):
        for number, plan in enumerate(plans(left_name, device)):
            # The interpreter takes its time: there each plan gets one of the sizes.
            chosen = sizes if device != "cpu" else sizes[(place + number) % len(sizes) :][:1]
            for rows, columns, depth in chosen:
                left = stored(left_name, rows, depth, device)
                right = stored(right_name, columns, depth, device)
                check_close(multiply_triton(left, right, plan=plan), left, right, None)
        half = multiply_triton(left, right, out_dtype=torch.bfloat16, plan=plan)
        check_close(half, left, right, None)
        before = torch.randn(rows, columns, device=device)
        out = before.clone()
        assert multiply_triton(left, right, out=out, plan=plan) is out
        check_close(out, left, right, before)


def check_whole_numbers(device: str) -> None:
    """Every product and sum is a whole number (in units of the scales' products): equality."""
    from megatron_ext.precision.gemm_triton import multiply_triton

    for name in ("fp8_tensor", "fp8_row", "fp8_1x128", "fp8_128x128", "mxfp8", "mxfp4"):
        for plan in plans(name, device):
            left = stored(name, 37, 160, device, whole=True)
            right = stored(name, 130, 160, device, whole=True)
            found = multiply_triton(left, right, plan=plan)
            assert torch.equal(found.cpu(), multiply(left, right).cpu()), name


def check_grouped(device: str, all_counts: tuple[tuple[int, ...], ...] = COUNTS) -> None:
    from megatron_ext.precision.grouped_gemm_triton import grouped_multiply_triton

    columns, depth = 150, 160
    for left_name, right_name in GROUPED_PAIRS:
        for number, counts in enumerate(all_counts):
            available = plans(left_name, device)
            plan = available[number % len(available)]
            lefts = [_of_expert(left_name, count, depth, device, 0) for count in counts]
            rights = [stored(right_name, columns, depth, device) for _ in counts]
            starts = torch.tensor([0, *counts], device=device).cumsum(0)
            left, right = joined(lefts, "rows"), joined(rights, "stacked")
            before = torch.randn(sum(counts), columns, device=device)
            added = before if number % 2 else None
            out = None if added is None else added.clone()
            found = grouped_multiply_triton(left, right, starts, out=out, plan=plan)
            _check_parts(found, left, right, starts, added)


def check_wgrad(device: str, all_counts: tuple[tuple[int, ...], ...] = COUNTS) -> None:
    from megatron_ext.precision.grouped_gemm_triton import grouped_multiply_triton

    rows, columns = 70, 131
    for left_name, right_name in WGRAD_PAIRS:
        for number, counts in enumerate(all_counts):
            # Tokens are filled up; to a step of the kernel where TMA is to read them.
            block = BLOCK_FORMATS[left_name].block_columns or 2
            for unit in (256, block) if number == 0 else (256,):
                padded = tuple(-(-count // unit) * unit for count in counts)
                available = plans(left_name, device)
                plan = available[(number + 1) % len(available)]
                lefts = [_of_expert(left_name, rows, count, device, 1) for count in padded]
                rights = [_of_expert(right_name, columns, count, device, 1) for count in padded]
                starts = torch.tensor([0, *padded], device=device, dtype=torch.int32)
                starts = starts.cumsum(0, dtype=torch.int32)
                left, right = joined(lefts, "columns"), joined(rights, "columns")
                before = torch.randn(len(padded), rows, columns, device=device)
                added = before if number % 2 else None
                out = None if added is None else added.clone()
                found = grouped_multiply_triton(
                    left, right, starts, out=out, alignment=unit, plan=plan
                )
                _check_parts(found, left, right, starts, added)


def _of_expert(name: str, rows: int, columns: int, device: str, dim: int) -> Quantized:
    """A matrix with or without tokens (`dim`); a scale of a tensor or row is there all the same."""
    if rows and columns:
        return stored(name, rows, columns, device)
    part = stored(name, max(rows, 1), max(columns, 128), device)
    blocks = (part.block_format.block_rows, part.block_format.block_columns)
    scales = part.scales if blocks[dim] is None else part.scales.narrow(dim, 0, 0)
    return replace(part, codes=part.codes.narrow(dim, 0, 0), scales=scales)


def _check_parts(
    found: Tensor,
    left: GroupedQuantized,
    right: GroupedQuantized,
    starts: Tensor,
    added: Tensor | None,
) -> None:
    bounds = starts.tolist()
    for expert, (first, last) in enumerate(pairwise(bounds)):
        place = slice(first, last) if left.layout == "rows" else expert
        parts = left.part(expert, first, last), right.part(expert, first, last)
        check_close(found[place], *parts, None if added is None else added[place])


@needs_triton
@pytest.mark.parametrize("part", ["single", "grouped"])
def test_interpreted_products_equal_the_definition(part: str) -> None:
    run_interpreted(__file__, part)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_products_on_a_device() -> None:
    check_products("cuda", (*SIZES, (1000, 1024, 2048)))
    check_whole_numbers("cuda")
    check_grouped("cuda", (*COUNTS[:2], (300, 0, 1, 1000)))
    check_wgrad("cuda", (*COUNTS[:2], (300, 0, 1, 1000)))


@needs_triton
def test_what_does_not_go_together_is_refused() -> None:
    from megatron_ext.precision.gemm_triton import multiply_triton
    from megatron_ext.precision.grouped_gemm_triton import grouped_multiply_triton

    left = stored("mxfp8", 4, 64, "cpu")
    for name in ("fp8_1x128", "fp8_tensor", "mxfp4", "nvfp4"):
        with pytest.raises(ValueError, match=f"no product of mxfp8 with {name}"):
            multiply_triton(left, stored(name, 4, 128, "cpu"))
    with pytest.raises(ValueError, match="left has 64 columns and right 32"):
        multiply_triton(left, stored("mxfp8", 4, 32, "cpu"))
    for out in (torch.zeros(4, 4).bfloat16(), torch.zeros(4, 5), torch.zeros(4, 8)[:, ::2]):
        with pytest.raises(ValueError, match=r"contiguous float32 \[4, 4\]"):
            multiply_triton(left, left, out=out)
    rows, weights = joined([left], "rows"), joined([left], "stacked")
    starts = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="no product of stacked with rows"):
        grouped_multiply_triton(weights, rows, starts)
    with pytest.raises(ValueError, match="of 2 experts do not go"):
        grouped_multiply_triton(rows, weights, torch.tensor([0, 2, 4]))
    square = stored("fp8_128x128", 4, 64, "cpu")
    with pytest.raises(ValueError, match="blocks of 128 rows"):
        joined([square], "rows")
    with pytest.raises(ValueError, match="no experts"):
        joined([], "rows")


@pytest.mark.parametrize("layout", ["rows", "stacked", "columns"])
@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_row", "mxfp4", "nvfp4"])
def test_a_part_of_the_joined_is_what_was_joined(layout: Layout, name: str) -> None:
    matrices = [stored(name, 8, 64, "cpu") for _ in range(3)]
    whole = joined(matrices, layout)
    length = 64 if layout == "columns" else 8
    for expert, matrix in enumerate(matrices):
        part = whole.part(expert, expert * length, (expert + 1) * length)
        assert torch.equal(part.values(), matrix.values())


@pytest.mark.parametrize(
    ("name", "target", "kind"),
    [
        ("fp8_1x128", Target("cuda", "90"), "blockwise"),
        ("fp8_tensor", Target("hip", "gfx90a"), "emulated"),
        ("mxfp8", Target("cuda", "90"), "emulated"),
        ("mxfp4", Target("hip", "gfx950"), "native"),
        ("nvfp4", Target("hip", "gfx950"), "emulated"),
        ("nvfp4", Target("cuda", "120"), "native"),
    ],
)
def test_what_a_target_does_in_hardware(name: str, target: Target, kind: str) -> None:
    assert kind_of(BLOCK_FORMATS[name], target) == kind


if __name__ == "__main__":
    torch.manual_seed(1)
    for check in {
        "single": (check_products, check_whole_numbers),
        "grouped": (check_grouped, check_wgrad),
    }[sys.argv[1]]:
        check("cpu")
