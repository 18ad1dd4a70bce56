"""Kernels of few bits against their definition, on the device they run on.

Quantisers: every bit of codes, scales and masks is that of the reference on the CPU, for all
operands of all recipes, the copy of the transpose too.

Products: operands whose elements are -2 to 2 and whose scales are powers of two make sums that
float32, and the 13 bits in which FP8 tensor cores align what they add, hold without rounding: all
results must be equal. Random operands make others: a float32 sum of k products in any order is
within k 2^-24 sum |a b| of the exact one, k 2^-23 where tensor cores cut and do not round; those
for FP8 of sm_90 and sm_89 cut each of the 33 numbers that an instruction adds (32 products and the
sum so far) at 2^-13 of the largest, four times in each 128 columns: 132 2^-13 sum |a b| more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ext.precision.backend import implementation, makes_both, why_not
from megatron_ext.precision.block_format import BLOCK_FORMATS, BlockFormat
from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.formats import encode
from megatron_ext.precision.grouped_quantized import GroupedQuantized, joined
from megatron_ext.precision.linear_recipe import BackendName, linear_recipes
from megatron_ext.precision.packing import pack
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import random_signs
from megatron_ext.precision.reference import quantize
from megatron_ext.precision.scales import encode_e8m0, encode_scale_e4m3
from scripts.bench.precision_bench import Bench

Call = Callable[..., Any]
Formats = tuple[BlockFormat, BlockFormat]

# By whether it is quick. Rows and columns of both copies must be whole groups in the second.
_SHAPES = {True: ((1, 128), (37, 256)), False: ((1, 128), (131, 384), (515, 1152))}
_BOTH_SHAPES = {True: ((128, 256),), False: ((128, 256), (384, 640))}
_PRODUCTS = {True: ((1, 16, 128), (37, 48, 256)), False: ((1, 16, 128), (131, 272, 384))}
_FLOAT32_STEP, _TENSOR_CORE_STEP = 2.0**-24, 132 * 2.0**-13
_SEED = 5


def check_stores(bench: Bench, backend: BackendName) -> None:
    """`quantize` and, where the backend has it, both copies at once."""
    device = torch.device(bench.device)
    for name, quantizer in quantizers().items():
        if reason := why_not(backend, "quantize", quantizer, device):
            bench.add("quantize", backend, name, "skipped", reason)
            continue
        bench.check("quantize", backend, name, partial(_check_quantizer, bench, backend, quantizer))
    for name, (row, transposed) in copied_twice().items():
        if why_not(backend, "quantize", row, device) or not makes_both(backend, row, transposed):
            bench.add("quantize both", backend, name, "skipped", "no kernel makes both copies")
            continue
        bench.check(
            "quantize both",
            backend,
            name,
            partial(_check_both, bench, backend, row, transposed),
        )


def check_products(bench: Bench, backend: BackendName) -> None:
    device = torch.device(bench.device)
    for formats in product_formats():
        case = _in_words(formats)
        if reason := why_not(backend, "multiply", formats, device):
            bench.add("multiply", backend, case, "skipped", reason)
            continue
        call = implementation(backend, "multiply")
        bench.check(
            "multiply",
            backend,
            case,
            partial(_check_product, bench, call, formats),
        )


def check_experts(bench: Bench, backend: BackendName) -> None:
    device = torch.device(bench.device)
    for layout in ("rows", "columns"):
        for formats in product_formats(of_wgrad=layout == "columns"):
            case = f"{layout} {_in_words(formats)}"
            if layout == "rows" and formats[0].block_rows not in (None, 1):
                continue
            if reason := why_not(backend, "grouped_multiply", formats, device):
                bench.add("multiply experts", backend, case, "skipped", reason)
                continue
            call = implementation(backend, "grouped_multiply")
            bench.check(
                "multiply experts",
                backend,
                case,
                partial(_check_grouped, bench, call, formats, layout),
            )


def quantizers() -> dict[str, Quantizer]:
    """Those of all recipes, by recipe and operand, each once; the rest of the formats plainly."""
    found: dict[str, Quantizer] = {}
    for recipe in linear_recipes().values():
        for operand, quantizer in recipe.operands().items():
            if quantizer is not None and quantizer not in found.values():
                found[f"{recipe.name}.{operand}"] = quantizer
    used = {quantizer.block_format for quantizer in found.values()}
    rest = [each for each in BLOCK_FORMATS.values() if each not in used]
    return found | {block_format.name: Quantizer(block_format) for block_format in rest}


def copied_twice() -> dict[str, tuple[Quantizer, Quantizer]]:
    """Quantizers of inputs and of gradients: for the row copy and for the transpose's."""
    found: dict[str, tuple[Quantizer, Quantizer]] = {}
    for recipe in linear_recipes().values():
        operands = recipe.operands()
        for row, transposed in (("forward_input", "wgrad_input"), ("dgrad_grad", "wgrad_grad")):
            first, second = operands[row], operands[transposed]
            if first is not None and second is not None and (first, second) not in found.values():
                found[f"{recipe.name}.{row}"] = first, second
    return found


def product_formats(*, of_wgrad: bool | None = None) -> Iterator[Formats]:
    """Pairs that a recipe multiplies, each once; of_wgrad: only those that wgrad does, or not."""
    seen = set()
    for recipe in linear_recipes().values():
        operands = list(recipe.operands().values())
        for place, (left, right) in enumerate(zip(operands[::2], operands[1::2], strict=True)):
            if left is None or right is None or of_wgrad not in (None, place == 2):
                continue
            pair = (left.block_format, right.block_format)
            if pair not in seen:
                seen.add(pair)
                yield pair


def ugly_matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers with outliers, a block of zeros and one of tiny numbers."""
    generator = torch.Generator().manual_seed(rows * 7919 + columns)
    matrix = torch.randn(rows, columns, generator=generator)
    matrix[torch.rand(rows, columns, generator=generator) < 0.001] *= 300.0
    matrix[0, :32] = 0.0
    matrix[-1, -16:] *= 1e-30
    return matrix.to(dtype)


def _signs(quantizer: Quantizer, seed: int) -> Tensor | None:
    return None if quantizer.signs == "none" else random_signs(seed, quantizer.hadamard_group)


def _request(quantizer: Quantizer, seed: int, device: str) -> CopyRequest:
    signs = _signs(quantizer, seed)
    return CopyRequest(quantizer, seed, None if signs is None else signs.to(device))


def _check_quantizer(bench: Bench, backend: BackendName, quantizer: Quantizer) -> tuple[bool, str]:
    """All bits, in bfloat16 and float32 and several shapes."""
    run = implementation(backend, "quantize")
    request = _request(quantizer, _SEED, bench.device)
    shapes = _SHAPES[bench.settings.is_quick]
    for dtype in (torch.bfloat16, torch.float32):
        for rows, columns in shapes:
            matrix = ugly_matrix(rows, columns, dtype)
            signs = _signs(quantizer, _SEED)
            expected = quantize(matrix, quantizer, seed=_SEED, signs=signs)
            found = run(matrix.to(bench.device), quantizer, seed=_SEED, signs=request.signs)
            if problem := difference(found, expected):
                return False, f"{rows} x {columns} {dtype}: {problem}"
    return True, f"bits of {len(shapes)} shapes in bfloat16 and float32"


def _check_both(
    bench: Bench, backend: BackendName, row: Quantizer, transposed: Quantizer
) -> tuple[bool, str]:
    run = implementation(backend, "quantize_both")
    requests = [
        _request(quantizer, _SEED + place, bench.device)
        for place, quantizer in enumerate((row, transposed))
    ]
    shapes = _BOTH_SHAPES[bench.settings.is_quick]
    for rows, columns in shapes:
        matrix = ugly_matrix(rows, columns, torch.bfloat16)
        found = run(matrix.to(bench.device), *requests)
        for place, values in enumerate((matrix, matrix.t())):
            quantizer, seed = requests[place].quantizer, _SEED + place
            expected = quantize(values, quantizer, seed=seed, signs=_signs(quantizer, seed))
            if problem := difference(found[place], expected):
                which = ("row copy", "transposed copy")[place]
                return False, f"{which} of {rows} x {columns}: {problem}"
    return True, f"bits of both copies of {len(shapes)} shapes"


def difference(found: Quantized, expected: Quantized) -> str:
    """The first tensor that is not the same bit by bit (any NaN is a NaN); "" where none is."""
    names = ("codes", "scales", "tensor_scale", "kept")
    for name, left, right in zip(names, found.tensors(), expected.tensors(), strict=True):
        if left is None or right is None:
            if left is not right:
                return f"{name} is {'missing' if left is None else 'not asked for'}"
            continue
        left = left.cpu()
        if left.shape != right.shape or left.dtype != right.dtype:
            return f"{name} is {left.dtype} {list(left.shape)}, not {list(right.shape)}"
        same = (left == right) | ((left != left) & (right != right))
        if not bool(same.all()):
            return f"{int((~same).sum())} of {same.numel()} {name} differ"
    return ""


def exact_operand(rows: int, columns: int, block_format: BlockFormat, seed: int) -> Quantized:
    """Elements from -2 to 2 and scales 1/2, 1, 2: sums of a few hundred products are exact."""
    generator = torch.Generator().manual_seed(seed)
    elements = torch.randint(-2, 3, (rows, columns), generator=generator).float()
    codes = encode(elements, block_format.element)
    grid = block_format.grid(rows, columns)
    scales = torch.exp2(torch.randint(-1, 2, grid, generator=generator).float())
    if block_format.scale == "e8m0":
        scales = encode_e8m0(scales)
    elif block_format.scale == "e4m3":
        scales = encode_scale_e4m3(scales)
    return Quantized(
        block_format,
        pack(codes) if block_format.is_packed else codes,
        scales,
        torch.tensor(0.5) if block_format.has_tensor_scale else None,
    )


def _check_product(bench: Bench, call: Call, formats: Formats) -> tuple[bool, str]:
    """Exact operands give exact results, also where they are added; random ones stay in bounds."""
    device, worst = bench.device, 0.0
    for m, n, k in _PRODUCTS[bench.settings.is_quick]:
        left, right = exact_operand(m, k, formats[0], 1), exact_operand(n, k, formats[1], 2)
        expected = (left.values().double() @ right.values().double().t()).float()
        moved = to_device(left, device), to_device(right, device)
        found = call(*moved).cpu()
        if not torch.equal(found, expected):
            return False, f"{m} x {n} x {k}: {_share(found, expected)} of exact results differ"
        sums = torch.full((m, n), 3.0, device=device)
        call(*moved, out=sums)
        if not torch.equal(sums.cpu(), expected + 3.0):
            return False, f"{m} x {n} x {k}: {_share(sums.cpu(), expected + 3.0)} of sums differ"
        worst = max(worst, _random_error(call, (m, n, k), formats, device))
    return worst <= 1.0, f"exact results equal; random ones at {worst:.2g} of the error bound"


def _random_error(call: Call, shape: tuple[int, int, int], formats: Formats, device: str) -> float:
    """Largest error over its bound."""
    m, n, k = shape
    left = quantize(ugly_matrix(m, k, torch.float32), Quantizer(formats[0]))
    right = quantize(ugly_matrix(n, k, torch.float32), Quantizer(formats[1]))
    a, b = left.values().double(), right.values().double()
    step = k * _FLOAT32_STEP * (2 if device == "cuda" else 1)
    if device == "cuda" and formats[0].element.bits == 8:
        step += _TENSOR_CORE_STEP
    found = call(to_device(left, device), to_device(right, device)).cpu().double()
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    error = (found - a @ b.t()).abs()
    return float((error / (step * (a.abs() @ b.abs().t()) + 1e-30)).max())


def _check_grouped(bench: Bench, call: Call, formats: Formats, layout: str) -> tuple[bool, str]:
    """Experts with some, none and many tokens; exact operands, so all results must be equal."""
    device, (n, k) = bench.device, (48, 256)
    counts = (128, 0, 384) if layout == "columns" else (5, 0, 261)
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=device)
    operands: tuple[GroupedQuantized, GroupedQuantized]
    if layout == "rows":
        lefts = [exact_operand(rows, k, formats[0], 1 + rows) for rows in counts]
        rights = [exact_operand(n, k, formats[1], 2 + place) for place in range(len(counts))]
        operands = joined(lefts, "rows"), joined(rights, "stacked")
    else:
        lefts = [exact_operand(n, rows, formats[0], 1 + rows) for rows in counts]
        rights = [exact_operand(k, rows, formats[1], 2 + rows) for rows in counts]
        operands = joined(lefts, "columns"), joined(rights, "columns")
    products = [
        (left.values().double() @ right.values().double().t()).float()
        for left, right in zip(lefts, rights, strict=True)
    ]
    expected = torch.cat(products) if layout == "rows" else torch.stack(products)
    options = {} if layout == "rows" else {"alignment": 128}
    moved = [grouped_to_device(operand, device) for operand in operands]
    found = call(*moved, starts, **options).cpu()
    if not torch.equal(found, expected):
        return False, f"{_share(found, expected)} of exact results differ"
    sums = torch.full(expected.shape, 3.0, device=device)
    call(*moved, starts, out=sums, **options)
    if not torch.equal(sums.cpu(), expected + 3.0):
        return False, f"{_share(sums.cpu(), expected + 3.0)} of sums differ"
    return True, f"exact results of {len(counts)} experts equal, one without tokens"


def to_device(operand: Quantized, device: str) -> Quantized:
    moved = tuple(None if tensor is None else tensor.to(device) for tensor in operand.tensors())
    return Quantized.from_tensors(operand.block_format, moved)


def grouped_to_device(operand: GroupedQuantized, device: str) -> GroupedQuantized:
    tensor_scale = operand.tensor_scale
    return replace(
        operand,
        codes=operand.codes.to(device),
        scales=operand.scales.to(device),
        tensor_scale=None if tensor_scale is None else tensor_scale.to(device),
    )


def _in_words(formats: Formats) -> str:
    return f"{formats[0].name} by {formats[1].name}"


def _share(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"all ({list(found.shape)}, not {list(expected.shape)})"
    return f"{int((found != expected).sum())} of {expected.numel()}"
