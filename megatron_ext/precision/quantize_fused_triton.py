"""Quantising in Triton what comes out of RMSNorm or SwiGLU, without writing it first.

    rms_norm   y = x r w,  r = 1 / sqrt(mean(x^2) + eps) of its row     (`norm.py`)
    swiglu     y = silu(gate) up                                        (`moe/swiglu.py`)

The input is read, both copies of y in few bits are written, and y itself where it is asked for:
2 + 1 + 1 bytes an element of FP8 in place of 2 + 2 + 2 + 1 + 1. Bits are those of y rounded to the
dtype of the run and quantised then. A row's r needs a pass over the input before.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.quantize_launch_triton import Source
from megatron_ext.precision.quantize_triton import both_of, readable
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.reference import ReduceAmax
from megatron_ext.precision.tile_source_triton import reciprocal_root_mean_squares

_ROWS, _COLUMNS = 4, 1024


def quantize_rms_norm_triton(
    x: Tensor,
    weight: Tensor,
    row: CopyRequest,
    transposed: CopyRequest,
    *,
    eps: float,
    keeps_original: bool = False,
    reduce_amax: ReduceAmax | None = None,
) -> tuple[Quantized, Quantized, Tensor, Tensor | None]:
    """Both copies of RMSNorm(x).

    Args:
        x: [tokens, hidden]; weight: [hidden].

    Returns:
        The copy, that of the transpose, float32 [tokens] reciprocal root mean squares (backward
        wants them), and RMSNorm(x) where `keeps_original`.
    """
    x = readable(x)
    rrms = rrms_triton(x, eps=eps)
    original = torch.empty_like(x) if keeps_original else None
    source = Source(x, "rms_norm", weight, rrms, original)
    first, second = both_of(source, row, transposed, reduce_amax)
    return first, second, rrms, original


def quantize_swiglu_triton(
    gate_up: Tensor,
    row: CopyRequest,
    transposed: CopyRequest,
    *,
    keeps_original: bool = False,
    reduce_amax: ReduceAmax | None = None,
) -> tuple[Quantized, Quantized, Tensor | None]:
    """Both copies of silu(gate) * up, and that itself where `keeps_original`.

    Args:
        gate_up: [tokens, 2 * width], gates first.
    """
    gate_up = readable(gate_up)
    original = None
    if keeps_original:
        original = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    source = Source(gate_up, "swiglu", original=original)
    first, second = both_of(source, row, transposed, reduce_amax)
    return first, second, original


def rrms_triton(x: Tensor, *, eps: float) -> Tensor:
    """float32 [rows]: 1 / sqrt(mean(x^2) + eps)."""
    rows, columns = x.shape
    rrms = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        reciprocal_root_mean_squares[(triton.cdiv(rows, _ROWS),)](
            x,
            rrms,
            rows,
            columns,
            x.stride(0),
            1.0 / columns,
            eps,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            enable_fp_fusion=False,
        )
    return rrms
