"""FP8 products in blocks, single and of experts, beside other libraries' products.

    product     left [M, K] in 1 x 128, right [N, K] in 128 x 128 -> [M, N] bf16;   2 M N K FLOPs
    forward     rows [T, K] of E experts with [E, N, K]   -> [T, N] bf16;           2 T N K
    dgrad       gradients [T, N] with [E, K, N]           -> [T, K] bf16
    wgrad       [N, T] with [K, T] over each expert's T   -> [E, N, K] float32

Others: torch's `_scaled_mm` in every mode for FP8 that it has on this device, its `_grouped_mm`
and `_scaled_grouped_mm`, DeepGEMM if it is installed. Their operands and scales are brought into
their order before; ours are taken as quantising leaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from megatron_ext.precision.backend import implementation, why_not
from megatron_ext.precision.block_format import (
    FP8_1X128,
    FP8_128X128,
    FP8_TENSOR,
    MXFP8,
    BlockFormat,
    named_block_format,
)
from megatron_ext.precision.gemm_scaled_mm import prepared_scaled_mm, why_not_multiply
from megatron_ext.precision.grouped_quantized import GroupedQuantized, joined
from megatron_ext.precision.linear_recipe import BackendName
from megatron_ext.precision.quantize import quantize
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from scripts.bench.precision_bench import Bench, Settings, Side, in_words
from scripts.bench.precision_report import PEER

# M, N, K.
_SHAPES = ((4096, 7168, 16384), (8192, 8192, 8192))
_QUICK_SHAPES = ((128, 256, 128),)
# T, E, N, K: torchao's table of DeepGEMM on an H100.
_EXPERTS, _QUICK_EXPERTS = (32768, 8, 2048, 7168), (256, 2, 128, 256)
_FORMATS = FP8_1X128, FP8_128X128


def product_cases(settings: Settings) -> list[str]:
    return ["x".join(map(str, shape)) for shape in _shapes(settings)]


def time_products(bench: Bench, backend: BackendName) -> None:
    """One backend and all others, at each shape."""
    device = torch.device(bench.device)
    for m, n, k in _shapes(bench.settings):
        case, flops = f"{m}x{n}x{k}", 2e-12 * m * n * k
        x, w = random_matrix(m, k, bench.device), random_matrix(n, k, bench.device)
        sides = _peers(bench, case, x, w, flops)
        if reason := why_not(backend, "multiply", _FORMATS, device):
            bench.add("product", backend, case, "skipped", reason)
        else:
            left, right = _stored(x, FP8_1X128), _stored(w, FP8_128X128)
            sides.append(_own(backend, left, right, flops))
            if backend == "triton" and bench.device == "cuda":
                sides += _other_plans(left, right, flops)
        bench.time(case, sides)


def time_experts(bench: Bench, backend: BackendName) -> None:
    """Forward, dgrad and wgrad of one linear map of all experts."""
    num_tokens, num_experts, n, k = _QUICK_EXPERTS if bench.settings.is_quick else _EXPERTS
    case = f"M={num_tokens} E={num_experts} N={n} K={k}"
    flops = 2e-12 * num_tokens * n * k
    ends = torch.arange(num_experts + 1, dtype=torch.int32, device=bench.device)
    starts = ends * (num_tokens // num_experts)
    x, grad = (random_matrix(num_tokens, width, bench.device) for width in (k, n))
    weights = torch.stack([random_matrix(n, k, bench.device) for _ in range(num_experts)])
    device, sides = torch.device(bench.device), _expert_peers(bench, x, grad, weights, starts)
    for name, formats, make in (
        ("forward", _FORMATS, lambda: (_rows(x), _stacked(weights))),
        ("dgrad", _FORMATS, lambda: (_rows(grad), _stacked(weights.transpose(1, 2)))),
        ("wgrad", (FP8_1X128, FP8_1X128), lambda: (_columns(grad), _columns(x))),
    ):
        kernel = f"experts {name}"
        if reason := why_not(backend, "grouped_multiply", formats, device):
            bench.add(kernel, backend, case, "skipped", reason)
            continue
        operands = bench.prepare(kernel, backend, case, make)
        if operands is not None:
            call = _grouped_call(backend, operands, starts, adds=False)
            sides.append(Side(kernel, backend, call, flops, "TFLOP/s"))
            if name == "wgrad":
                call = _grouped_call(backend, operands, starts, adds=True)
                sides.append(Side(f"{kernel} added", backend, call, flops, "TFLOP/s"))
    bench.time(case, sides)


def random_matrix(rows: int, columns: int, device: str) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.bfloat16, device=device)


def _shapes(settings: Settings) -> tuple[tuple[int, int, int], ...]:
    return _QUICK_SHAPES if settings.is_quick else _SHAPES


def _stored(matrix: Tensor, block_format: BlockFormat) -> Quantized:
    return quantize(matrix, Quantizer(block_format))


def _own(backend: BackendName, left: Quantized, right: Quantized, flops: float) -> Side:
    run = implementation(backend, "multiply")
    return Side(
        "product",
        backend,
        lambda: run(left, right, out_dtype=torch.bfloat16),
        flops,
        "TFLOP/s",
        "1x128 by 128x128",
    )


def _other_plans(left: Quantized, right: Quantized, flops: float) -> list[Side]:
    """Tile sizes that the table did not choose: is one faster?"""
    from megatron_ext.precision.gemm_config import candidates
    from megatron_ext.precision.gemm_launch_triton import current_target
    from megatron_ext.precision.gemm_triton import multiply_triton

    sides = []
    for plan in candidates(left.block_format, current_target())[1:]:
        tile = plan.tile
        detail = (
            f"{tile.rows} x {tile.parts} x {tile.columns}, {tile.num_stages} stages, "
            f"{tile.num_warps} warps, window {tile.window}"
        )

        call = partial(multiply_triton, left, right, out_dtype=torch.bfloat16, plan=plan)
        sides.append(Side("product, other plan", "triton", call, flops, "TFLOP/s", detail))
    return sides


def _peers(bench: Bench, case: str, x: Tensor, w: Tensor, flops: float) -> list[Side]:
    sides = []
    rows = named_block_format("fp8_row")
    for left_format, right_format in (
        (FP8_TENSOR, FP8_TENSOR),
        (rows, rows),
        _FORMATS,
        (FP8_1X128, FP8_1X128),
        (MXFP8, MXFP8),
    ):
        names = [each.name.removeprefix("fp8_") for each in (left_format, right_format)]
        name = f"scaled_mm {names[0]} by {names[1]}"
        if reason := why_not_multiply((left_format, right_format), x.device):
            bench.add("product", PEER, case, "skipped", f"{name}: {reason}")
            continue
        left, right = _stored(x, left_format), _stored(w, right_format)
        is_whole = left_format.block_columns is None
        for is_fast in (False, True) if is_whole and x.is_cuda else (False,):
            call = bench.prepare(
                "product",
                PEER,
                case,
                partial(prepared_scaled_mm, left, right, torch.bfloat16, uses_fast_accum=is_fast),
            )
            if call is not None:
                detail = f"{name}, fast sums" if is_fast else name
                sides.append(Side("product", PEER, call, flops, "TFLOP/s", detail))
    sides += _deep_gemm(bench, case, x, w, flops)
    sides.append(Side("product in bf16", PEER, lambda: x @ w.t(), flops, "TFLOP/s"))
    return sides


def _deep_gemm(bench: Bench, case: str, x: Tensor, w: Tensor, flops: float) -> list[Side]:
    try:
        fp8_gemm_nt = import_module("deep_gemm").fp8_gemm_nt
    except Exception as error:
        bench.add("product", PEER, case, "skipped", f"deep_gemm: {in_words(error)}")
        return []
    operands = [
        (stored.codes.view(torch.float8_e4m3fn), stored.scales)
        for stored in (_stored(x, FP8_1X128), _stored(w, FP8_128X128))
    ]
    out = torch.empty(len(x), len(w), dtype=torch.bfloat16, device=x.device)
    call = partial(fp8_gemm_nt, *operands, out)
    return [Side("product", PEER, call, flops, "TFLOP/s", "deep_gemm 1x128 by 128x128")]


def _rows(matrix: Tensor) -> GroupedQuantized:
    stored = _stored(matrix, FP8_1X128)
    return GroupedQuantized(FP8_1X128, "rows", stored.codes, stored.scales)


def _stacked(weights: Tensor) -> GroupedQuantized:
    return joined([_stored(weight, FP8_128X128) for weight in weights], "stacked")


def _columns(matrix: Tensor) -> GroupedQuantized:
    """Of the transpose."""
    stored = _stored(matrix.t(), FP8_1X128)
    return GroupedQuantized(FP8_1X128, "columns", stored.codes, stored.scales)


def _grouped_call(
    backend: BackendName,
    operands: tuple[GroupedQuantized, GroupedQuantized],
    starts: Tensor,
    *,
    adds: bool,
) -> Callable[[], Any]:
    run = implementation(backend, "grouped_multiply")
    left, right = operands
    if left.layout == "rows":
        return lambda: run(left, right, starts, out_dtype=torch.bfloat16)
    if not adds:
        return lambda: run(left, right, starts, alignment=128)
    shape = starts.numel() - 1, left.shape[0], right.shape[0]
    sums = torch.zeros(shape, device=starts.device)
    return lambda: run(left, right, starts, alignment=128, out=sums)


def _expert_peers(
    bench: Bench, x: Tensor, grad: Tensor, weights: Tensor, starts: Tensor
) -> list[Side]:
    """torch's products of experts in bf16, and in FP8 with a scale for each row."""
    ends, flops = starts[1:], 2e-12 * x.numel() * weights.shape[1]
    torch_ops: Any = torch
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, left, right in (
        ("forward", x, weights.transpose(1, 2)),
        ("dgrad", grad, weights),
        ("wgrad", grad.t(), x),
    ):
        calls[name, "grouped_mm bf16"] = partial(torch_ops._grouped_mm, left, right, offs=ends)
        if bench.device == "cuda":
            calls[name, "scaled_grouped_mm by rows"] = _scaled_grouped(left, right, ends)
    return [
        Side(f"experts {name}", PEER, call, flops, "TFLOP/s", detail)
        for (name, detail), call in calls.items()
    ]


def _scaled_grouped(left: Tensor, right: Tensor, ends: Tensor) -> Callable[[], Any]:
    """Scales are ones: the time is that of any."""
    fp8, num_experts = torch.float8_e4m3fn, ends.numel()
    a = left.contiguous().to(fp8)
    b = right.transpose(-2, -1).contiguous().to(fp8).transpose(-2, -1)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=left.device)

    if right.dim() == 3:
        scales = ones(len(left)), ones(num_experts, right.shape[2])
    else:
        scales = ones(num_experts * len(left)), ones(num_experts * right.shape[1])
    scaled_grouped_mm = cast(Any, torch)._scaled_grouped_mm
    return lambda: scaled_grouped_mm(
        a, b, *scales, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
    )
