"""Quantising beside a copy: bytes that must be read and written once, by the time.

    cast 1x128                bf16 -> FP8 with a float32 scale for each 128 (DeepSeek-V3)
    hadamard fp4              bf16 -> Hadamard of 32 -> MXFP4 (Quartet's gradients): the row copy,
                              the copy of the transpose, and both from one reading of the matrix

and a linear layer of few bits, forward and backward, beside the same layer in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.precision.backend import implementation, makes_both, why_not
from megatron_ext.precision.block_format import FP8_1X128
from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.linear import low_precision_linear
from megatron_ext.precision.linear_operands import LinearSeeds
from megatron_ext.precision.linear_recipe import BackendName, linear_recipes
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import random_signs
from scripts.bench.kernel_timing import copy_bytes_per_second
from scripts.bench.precision_bench import Bench, Side
from scripts.bench.precision_products import random_matrix
from scripts.bench.precision_report import BF16, COPY

_SHAPE, _QUICK_SHAPE = (32768, 7168), (128, 256)
# Tokens, features in and out.
_LAYERS, _QUICK_LAYERS = ((8192, 7168, 4096), (16384, 8192, 8192)), ((128, 256, 128),)
_LAYER_RECIPES = ("fp8_blockwise", "fp8_tensorwise", "mxfp8", "nvfp4", "quartet")


def time_stores(bench: Bench, backend: BackendName) -> None:
    rows, columns = _QUICK_SHAPE if bench.settings.is_quick else _SHAPE
    case = f"{rows} x {columns} bf16"
    speed = copy_bytes_per_second(bench.device, bench.settings.rounds)
    bench.add("copy", COPY, "bytes read and written", "measured", value=speed / 1e9, unit="GB/s")
    matrix = random_matrix(rows, columns, bench.device)
    recipes, sides = linear_recipes(), []
    fp4, nvfp4 = recipes["quartet"].dgrad_grad, recipes["nvfp4"].wgrad_grad
    mask = recipes["quartet"].forward_input
    assert fp4 is not None
    assert nvfp4 is not None
    assert mask is not None
    for kernel, quantizer in (
        ("cast 1x128", Quantizer(FP8_1X128)),
        ("hadamard fp4 row", fp4),
        ("hadamard fp4 with mask", mask),
        ("hadamard nvfp4 row", nvfp4),
    ):
        sides += _side(bench, backend, case, kernel, matrix, quantizer)
    for kernel, quantizer in (
        ("cast 1x128", Quantizer(FP8_1X128)),
        ("hadamard fp4", fp4),
        ("hadamard nvfp4", nvfp4),
    ):
        sides += _sides_of_both(bench, backend, case, kernel, matrix, quantizer)
    bench.time(case, sides)


def time_layers(bench: Bench, backend: BackendName) -> None:
    """Forward and backward with both gradients, by all recipes and in bf16."""
    layers = _QUICK_LAYERS if bench.settings.is_quick else _LAYERS
    for num_tokens, in_size, out_size in layers:
        case = f"{num_tokens} tokens, {in_size} -> {out_size}"
        rows = random_matrix(num_tokens, in_size, bench.device).requires_grad_()
        weight = random_matrix(out_size, in_size, bench.device).requires_grad_()
        grad = random_matrix(num_tokens, out_size, bench.device)
        flops = 6e-12 * num_tokens * in_size * out_size
        kernel, sides = "linear forward+backward", []
        plain = _pass(partial(F.linear, rows, weight), rows, weight, grad)
        sides.append(Side(kernel, BF16, plain, flops, "TFLOP/s"))
        for name in _LAYER_RECIPES:
            recipe = replace(linear_recipes()[name], backend=backend)
            call = _pass(
                partial(low_precision_linear, rows, weight, recipe, LinearSeeds(1, 2)),
                rows,
                weight,
                grad,
            )
            named = kernel if name == "fp8_blockwise" else f"linear {name}"
            if reason := _why_no_layer(bench, backend, name):
                bench.add(named, backend, case, "skipped", reason)
                continue
            sides.append(Side(named, backend, call, flops, "TFLOP/s", name))
        bench.time(case, sides)


def _side(
    bench: Bench, backend: BackendName, case: str, kernel: str, matrix: Tensor, quantizer: Quantizer
) -> list[Side]:
    if reason := why_not(backend, "quantize", quantizer, matrix.device):
        bench.add(kernel, backend, case, "skipped", reason)
        return []
    run, request = implementation(backend, "quantize"), _request(quantizer, matrix)

    def call() -> Quantized:
        stored: Quantized = run(matrix, quantizer, seed=request.seed, signs=request.signs)
        return stored

    return _timed(bench, backend, case, kernel, matrix, call)


def _sides_of_both(
    bench: Bench, backend: BackendName, case: str, kernel: str, matrix: Tensor, quantizer: Quantizer
) -> list[Side]:
    """The transposed copy alone, and both."""
    names = f"{kernel} transposed", f"{kernel} both"
    reason = why_not(backend, "quantize", quantizer, matrix.device)
    if not reason and not makes_both(backend, quantizer, quantizer):
        reason = "it has no kernel for the copy of the transpose"
    if reason:
        for name in names:
            bench.add(name, backend, case, "skipped", reason)
        return []
    run, request = implementation(backend, "quantize_both"), _request(quantizer, matrix)
    other = replace(request, seed=request.seed + 1)

    store = implementation(backend, "quantize")

    def transposed() -> Any:
        if backend == "cuda":
            return run(matrix, None, request)
        # A view: the kernel reads it as it lies.
        return store(matrix.t(), quantizer, seed=request.seed, signs=request.signs)

    def both() -> Any:
        return run(matrix, other, request)

    return [
        *_timed(bench, backend, case, names[0], matrix, transposed),
        *_timed(bench, backend, case, names[1], matrix, both),
    ]


def _timed(
    bench: Bench,
    backend: BackendName,
    case: str,
    kernel: str,
    matrix: Tensor,
    call: Callable[[], Any],
) -> list[Side]:
    """What is written is counted on what a first call makes."""
    stored = bench.prepare(kernel, backend, case, call)
    if stored is None:
        return []
    copies = stored if isinstance(stored, tuple) else (stored,)
    num_bytes = matrix.nbytes + sum(copy.num_bytes() for copy in copies if copy is not None)
    return [Side(kernel, backend, call, num_bytes / 1e9, "GB/s")]


def _request(quantizer: Quantizer, matrix: Tensor) -> CopyRequest:
    signs = None
    if quantizer.signs != "none":
        signs = random_signs(3, quantizer.hadamard_group).to(matrix.device)
    return CopyRequest(quantizer, 7, signs)


def _pass(
    forward: Callable[[], Tensor], rows: Tensor, weight: Tensor, grad: Tensor
) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(forward(), [rows, weight], grad)


def _why_no_layer(bench: Bench, backend: BackendName, name: str) -> str:
    """Empty where the backend multiplies what the recipe has."""
    operands = list(linear_recipes()[name].operands().values())
    for left, right in zip(operands[::2], operands[1::2], strict=True):
        if left is not None and right is not None:
            formats = left.block_format, right.block_format
            if reason := why_not(backend, "multiply", formats, torch.device(bench.device)):
                return reason
    return ""
