"""Quantising what comes out of RMSNorm or SwiGLU without writing it first: right, and how fast.

Both copies have the bits of the reference on the kernel's own y, which is within two steps of
bfloat16 of the float64 formula (one to round it, one for float32's errors next to a tie). Bytes are
those that must move: the input, and both copies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ext.precision.backend import why_not
from megatron_ext.precision.block_format import FP8_1X128
from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.linear_recipe import BackendName
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.reference import quantize
from scripts.bench.precision_bench import Bench, Side
from scripts.bench.precision_checks import difference
from scripts.bench.precision_products import random_matrix

_EPS = 1e-5
_STEPS = 2 * 2.0**-8
_KINDS = ("rms_norm", "swiglu")
# Tokens and columns of y: checked, and timed.
_CHECKED, _TIMED = (256, 384), (16384, 7168)


def check_fused(bench: Bench, backend: BackendName) -> None:
    for kind in _kinds(bench, backend, "fused"):
        bench.check(f"fused {kind}", backend, "fp8_1x128", partial(_check, bench, kind))


def time_fused(bench: Bench, backend: BackendName) -> None:
    tokens, columns = _CHECKED if bench.settings.is_quick else _TIMED
    case, sides = f"{tokens} x {columns} bf16", []
    for kind in _kinds(bench, backend, case):
        matrix, weight = _input(kind, tokens, columns, bench.device)
        call = partial(_run, kind, matrix, weight, keeps_original=False)
        made = bench.prepare(f"fused {kind}", backend, case, call)
        if made is not None:
            num_bytes = matrix.nbytes + made[0].num_bytes() + made[1].num_bytes()
            sides.append(Side(f"fused {kind}", backend, call, num_bytes / 1e9, "GB/s"))
    bench.time(case, sides)


def _kinds(bench: Bench, backend: BackendName, case: str) -> tuple[str, ...]:
    """None, and a record, where the backend has no such kernels here."""
    reason = "it has no fused kernels"
    if backend == "triton":
        reason = why_not(backend, "quantize", Quantizer(FP8_1X128), torch.device(bench.device))
    for kind in _KINDS if reason else ():
        bench.add(f"fused {kind}", backend, case, "skipped", reason)
    return () if reason else _KINDS


def _input(kind: str, tokens: int, columns: int, device: str) -> tuple[Tensor, Tensor]:
    width = 2 * columns if kind == "swiglu" else columns
    weight = 1.0 + 0.1 * torch.randn(columns, device=device)
    return random_matrix(tokens, width, device), weight.bfloat16()


def _run(kind: str, matrix: Tensor, weight: Tensor, *, keeps_original: bool) -> tuple[Any, ...]:
    """The copy, that of the transpose, and last y."""
    from megatron_ext.precision import quantize_fused_triton as fused

    requests = [CopyRequest(Quantizer(FP8_1X128)), CopyRequest(Quantizer(FP8_1X128))]
    if kind == "swiglu":
        return fused.quantize_swiglu_triton(matrix, *requests, keeps_original=keeps_original)
    return fused.quantize_rms_norm_triton(
        matrix, weight, *requests, eps=_EPS, keeps_original=keeps_original
    )


def _check(bench: Bench, kind: str) -> tuple[bool, str]:
    matrix, weight = _input(kind, *_CHECKED, bench.device)
    row, transposed, *_, original = _run(kind, matrix, weight, keeps_original=True)
    expected = _FORMULAS[kind](matrix.double(), weight.double())
    error = (original.double() - expected).abs() / (expected.abs() + 1e-6)
    if not float(error.max()) <= _STEPS:
        return False, f"y differs by {float(error.max()):.2g} of itself"
    y = original.cpu()
    for name, found, values in (("row", row, y), ("transposed", transposed, y.t())):
        if problem := difference(found, quantize(values, Quantizer(FP8_1X128))):
            return False, f"{name} copy: {problem}"
    return True, "bits of both copies"


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(1, keepdim=True) + _EPS).rsqrt() * weight


def _swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    del weight
    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


_FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
}
