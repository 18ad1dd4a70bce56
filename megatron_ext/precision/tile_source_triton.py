"""What a tile to be quantised is, in Triton: read as it is, or made of what is read.

    rms_norm    x r w, r = 1 / sqrt(mean(x^2) + eps) of its row        (`norm.py`)
    swiglu      silu(gate) up, both halves of a row                    (`moe/swiglu.py`)

in float32 and rounded to the dtype of the run as their own kernels would, so that what is quantised
is what they would have written. silu(gate) is rounded too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_ext.precision.number_triton import bits_of, float_of


@triton.jit  # type: ignore[untyped-decorator]
def as_stored(values: tl.tensor, DTYPE: tl.constexpr, NATIVE: tl.constexpr) -> tl.tensor:
    """float32 rounded to a dtype: the nearest, ties to even."""
    if tl.bfloat16 == DTYPE and not NATIVE:
        # The interpreter cuts off.
        bits = bits_of(values)
        nearest = float_of((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000)
        return tl.where(values != values, values, nearest)
    return values.to(DTYPE).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _silu(gate: tl.tensor) -> tl.tensor:
    return tl.div_rn(gate, 1.0 + tl.exp(-gate))


@triton.jit  # type: ignore[untyped-decorator]
def source_tile(
    source: tl.tensor,
    weight: tl.tensor,
    rrms: tl.tensor,
    original: tl.tensor,
    first_row: tl.tensor,
    first_column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    BEFORE: tl.constexpr,
    WRITES: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """float32 [ROWS, COLUMNS], zeros beyond the matrix.

    Args:
        source: rows `stride` apart.
        weight, rrms: [columns] and float32 [rows], of RMSNorm.
        original: [rows, columns], written where WRITES.
    """
    DTYPE: tl.constexpr = source.dtype.element_ty
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    is_row = row < rows - first_row
    is_column = column < columns - first_column
    base = source + first_row.to(tl.int64) * stride + first_column
    place = base + (row * stride + column)
    mask = is_row & is_column
    values = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if BEFORE == "rms_norm":
        factor = tl.load(rrms + first_row + row, mask=is_row, other=0.0)
        gain = tl.load(weight + first_column + column, mask=is_column, other=0.0)
        values = as_stored(values * factor * gain.to(tl.float32), DTYPE, NATIVE)
    if BEFORE == "swiglu":
        up = tl.load(place + columns, mask=mask, other=0.0).to(tl.float32)
        values = as_stored(as_stored(_silu(values), DTYPE, NATIVE) * up, DTYPE, NATIVE)
    if WRITES:
        out = original + first_row.to(tl.int64) * columns + first_column
        tl.store(out + (row * columns + column), values.to(DTYPE), mask=mask)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def reciprocal_root_mean_squares(
    source: tl.tensor,
    rrms: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    share: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """1 / sqrt(mean(x^2) + eps) of each row: float32 [rows]. share: 1 / columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    base = source + row.to(tl.int64)[:, None] * stride
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        mask = (row < rows)[:, None] & (column < columns)
        values = tl.load(base + column, mask=mask, other=0.0).to(tl.float32)
        total += values * values
    mean = tl.sum(total, axis=1) * share
    found = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    tl.store(rrms + row, found, mask=row < rows)
