"""One pass over a matrix in Triton: its copy in few bits, its transpose's, or both.

A program reads a tile, does what comes before (`tile_source_triton.py`) and then for each copy

    x_h = x S H,   s = scale of each block of x_h,   c = encode(x_h * (1 / s)),   pack, store

in registers: groups of the row copy lie along the tile's rows, those of the other along its
columns. Scales of a whole row or tensor need a pass before (`largest_magnitudes`).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from megatron_ext.precision.block_scale_triton import (
    stored_scales,
    tensor_scale_of,
    unbiased_scales,
)
from megatron_ext.precision.copy_layout_triton import (
    flat_tile,
    grouped,
    line_and_place,
    positions_of,
    store_tile,
)
from megatron_ext.precision.element_format import ElementFormat
from megatron_ext.precision.group_triton import hadamard, packed, spread
from megatron_ext.precision.number_triton import (
    bits_of,
    cast_fp4,
    cast_fp8,
    encode,
    reciprocal,
    uniform_numbers,
)
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.tile_source_triton import source_tile


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """What a kernel is compiled for, of one copy.

    Attributes:
        has_signs: of the Hadamard transform.
        is_large: elements reach beyond 32 bits.
        converted: elements that the device converts to by itself, with the definition's bits.
    """

    quantizer: Quantizer
    has_signs: bool
    is_large: bool
    converted: tuple[str, ...]

    @property
    def group(self) -> int:
        """Columns that are looked at together; eight make a byte of the mask."""
        quantizer = self.quantizer
        return max(quantizer.block_format.block_columns or 8, quantizer.hadamard_group, 8)

    @property
    def block(self) -> int:
        """Columns that share a scale, or a group where all columns do."""
        return self.quantizer.block_format.block_columns or self.group

    @property
    def block_rows(self) -> int:
        return self.quantizer.block_format.block_rows or 1

    @property
    def casts(self) -> bool:
        quantizer = self.quantizer
        element: ElementFormat = quantizer.block_format.element
        # Some rules read the values back.
        is_plain = quantizer.rounding == "nearest" and quantizer.scale_rule != "eden"
        return is_plain and element.name in self.converted


@triton.jit  # type: ignore[untyped-decorator]
def _given_amax(
    amax: tl.tensor,
    first_line: tl.tensor,
    num_lines: tl.tensor,
    P: tl.constexpr,
    SHAPE: tl.constexpr,
    GROUP: tl.constexpr,
    TURNED: tl.constexpr,
) -> tl.tensor:
    """Of the row or the tensor, one number for each group: [outer, 1, inner]."""
    FORMAT: tl.constexpr = P.quantizer.block_format
    line, _ = line_and_place(SHAPE, TURNED)
    if FORMAT.block_rows is None:
        found = tl.load(amax + line * 0)
    else:
        found = tl.load(amax + first_line + line, mask=line < num_lines - first_line, other=0.0)
    if TURNED:
        found = tl.broadcast_to(found, (SHAPE[0] // GROUP, SHAPE[1]))
        return found[:, None, :]
    else:
        found = tl.broadcast_to(found, (SHAPE[0], SHAPE[1] // GROUP))
        return tl.reshape(found, (SHAPE[0] * SHAPE[1] // GROUP, 1, 1))


@triton.jit  # type: ignore[untyped-decorator]
def _store_codes(
    codes: tl.tensor,
    scaled: tl.tensor,
    uniform: tl.tensor,
    first_line: tl.tensor,
    first_place: tl.tensor,
    num_lines: tl.tensor,
    num_places: tl.tensor,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    TURNED: tl.constexpr,
) -> tl.tensor:
    """Round, pack and write; the values that were written, before they are scaled back."""
    ELEMENT: tl.constexpr = P.quantizer.block_format.element
    NUM: tl.constexpr = 8 // ELEMENT.bits
    if P.casts:
        rounded = scaled
        if ELEMENT.bits == 8:
            flat = flat_tile(cast_fp8(scaled, ELEMENT), ROWS, TURNED)
        else:
            pairs = tl.reshape(scaled, (scaled.shape[0], scaled.shape[1] // 2, 2, scaled.shape[2]))
            first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            flat = flat_tile(cast_fp4(first, second), ROWS, TURNED)
    else:
        words, rounded = encode(scaled, uniform, ELEMENT, P.quantizer.rounding == "stochastic")
        if NUM > 1:
            words = packed(words, ELEMENT.bits, NUM)
        flat = flat_tile(words.to(tl.uint8), ROWS, TURNED)
    store_tile(codes, flat, first_line, first_place // NUM, num_lines, num_places // NUM, 1, TURNED)
    return rounded


@triton.jit  # type: ignore[untyped-decorator]
def _store_copy(
    tile: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    tensor_scale: tl.tensor,
    kept: tl.tensor,
    signs: tl.tensor,
    amax: tl.tensor,
    key: tl.tensor,
    scales_key: tl.tensor,
    first_line: tl.tensor,
    first_place: tl.tensor,
    num_lines: tl.tensor,
    num_places: tl.tensor,
    P: tl.constexpr,
    TURNED: tl.constexpr,
) -> None:
    """One copy of a tile; lines and places are the copy's rows and columns."""
    Q: tl.constexpr = P.quantizer
    FORMAT: tl.constexpr = Q.block_format
    GROUP: tl.constexpr = P.group
    BLOCK: tl.constexpr = P.block
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    values = hadamard(grouped(tile, GROUP, TURNED), signs, Q.hadamard_group, P.has_signs)
    of_tensor = tensor_scale_of(amax, Q)
    if Q.has_tensor_scale:
        # From one program.
        tl.store(tensor_scale, of_tensor, mask=(first_line == 0) & (first_place == 0))
    given = of_tensor
    if FORMAT.block_columns is None:
        given = _given_amax(amax, first_line, num_lines, P, tile.shape, GROUP, TURNED)
    stored, used = stored_scales(values, given, of_tensor, Q, BLOCK, P.block_rows, COLUMNS // BLOCK)
    scaled = values * spread(reciprocal(used), BLOCK)
    uniform = scaled
    if Q.rounding == "stochastic":
        position = positions_of(tile.shape, first_line, first_place, num_places, P.is_large, TURNED)
        uniform = uniform_numbers(grouped(position, GROUP, TURNED), key, P.is_large)
    rounded = _store_codes(
        codes, scaled, uniform, first_line, first_place, num_lines, num_places, P, ROWS, TURNED
    )
    if Q.keeps_mask:
        is_kept = (tl.abs(scaled) < FORMAT.element.max_value).to(tl.int32)
        flat = flat_tile(packed(is_kept, 1, 8).to(tl.uint8), ROWS, TURNED)
        store_tile(kept, flat, first_line, first_place // 8, num_lines, num_places // 8, 1, TURNED)
    _store_scales(
        scales, values, rounded, used, stored, scales_key,
        first_line, first_place, num_lines, num_places, P, ROWS, TURNED,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _store_scales(
    scales: tl.tensor,
    values: tl.tensor,
    rounded: tl.tensor,
    used: tl.tensor,
    stored: tl.tensor,
    scales_key: tl.tensor,
    first_line: tl.tensor,
    first_place: tl.tensor,
    num_lines: tl.tensor,
    num_places: tl.tensor,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    TURNED: tl.constexpr,
) -> None:
    FORMAT: tl.constexpr = P.quantizer.block_format
    if FORMAT.block_columns is None:
        # One for a row: from the programs of its first columns; the tensor's from one program.
        lines = num_lines
        if FORMAT.block_rows is None:
            lines = tl.minimum(num_lines, 1)
        first = first_place // P.block
        store_tile(scales, flat_tile(stored, ROWS, TURNED), first_line, first, lines, 1, 1, TURNED)
    else:
        across = (num_places + P.block - 1) // P.block
        first = first_place // P.block
        if P.quantizer.scale_rule == "eden":
            flat_shape: tl.constexpr = flat_tile(stored, ROWS, TURNED).shape
            position = positions_of(flat_shape, first_line, first, across, P.is_large, TURNED)
            position = tl.reshape(position, stored.shape)
            # By a name: triton 3.6 passes no field of a constant on.
            Q: tl.constexpr = P.quantizer
            stored = unbiased_scales(
                values, rounded, used, stored, position, scales_key, Q, P.is_large
            )
        flat = flat_tile(stored, ROWS, TURNED)
        if FORMAT.scale != "fp32":
            flat = flat.to(tl.uint8)
        store_tile(scales, flat, first_line, first, num_lines, across, P.block_rows, TURNED)


@triton.jit(do_not_specialize=["row_key", "row_scales_key", "column_key", "column_scales_key"])  # type: ignore[untyped-decorator]
def quantize_tiles(
    source: tl.tensor,
    weight: tl.tensor,
    rrms: tl.tensor,
    original: tl.tensor,
    row_codes: tl.tensor,
    row_scales: tl.tensor,
    row_tensor_scale: tl.tensor,
    row_kept: tl.tensor,
    row_signs: tl.tensor,
    row_amax: tl.tensor,
    row_key: tl.tensor,
    row_scales_key: tl.tensor,
    column_codes: tl.tensor,
    column_scales: tl.tensor,
    column_tensor_scale: tl.tensor,
    column_kept: tl.tensor,
    column_signs: tl.tensor,
    column_amax: tl.tensor,
    column_key: tl.tensor,
    column_scales_key: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    BEFORE: tl.constexpr,
    WRITES: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """A tile of a matrix [rows, columns], and its copies.

    Args:
        source: rows `stride` apart; weight, rrms: of RMSNorm.
        original: what is stored before it is rounded, [rows, columns], where WRITES.
        row_..., column_...: tensors of the matrix's copy and of its transpose's; see `CopyPlan`.
        ROW, COLUMN: `CopyPlan`, or None where there is no such copy.
    """
    across = tl.cdiv(columns, TILE_COLUMNS)
    first_row = tl.program_id(0) // across * TILE_ROWS
    first_column = tl.program_id(0) % across * TILE_COLUMNS
    tile = source_tile(
        source, weight, rrms, original, first_row, first_column, rows, columns, stride,
        BEFORE, WRITES, NATIVE, TILE_ROWS, TILE_COLUMNS,
    )  # fmt: skip
    if ROW is not None:
        _store_copy(
            tile, row_codes, row_scales, row_tensor_scale, row_kept, row_signs, row_amax,
            row_key, row_scales_key, first_row, first_column, rows, columns, ROW, False,
        )  # fmt: skip
    if COLUMN is not None:
        _store_copy(
            tile, column_codes, column_scales, column_tensor_scale, column_kept, column_signs,
            column_amax, column_key, column_scales_key, first_column, first_row, columns, rows,
            COLUMN, True,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def largest_magnitudes(
    source: tl.tensor,
    weight: tl.tensor,
    rrms: tl.tensor,
    signs: tl.tensor,
    amax_bits: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    P: tl.constexpr,
    TURNED: tl.constexpr,
    BEFORE: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Of each row of a copy or of the whole, after the transform: magnitudes as bits, int32.

    Bits of positive floats are ordered as they are, with NaN above all.
    """
    across = tl.cdiv(columns, TILE_COLUMNS)
    first_row = tl.program_id(0) // across * TILE_ROWS
    first_column = tl.program_id(0) % across * TILE_COLUMNS
    tile = source_tile(
        source, weight, rrms, source, first_row, first_column, rows, columns, stride,
        BEFORE, False, NATIVE, TILE_ROWS, TILE_COLUMNS,
    )  # fmt: skip
    Q: tl.constexpr = P.quantizer
    values = hadamard(grouped(tile, P.group, TURNED), signs, Q.hadamard_group, P.has_signs)
    magnitude = bits_of(values) & 0x7FFF_FFFF
    if Q.block_format.block_rows == 1 and Q.block_format.block_columns is None:
        if TURNED:
            flat = tl.reshape(magnitude, (TILE_ROWS, TILE_COLUMNS))
            line = first_column + tl.arange(0, TILE_COLUMNS)
            tl.atomic_max(amax_bits + line, tl.max(flat, axis=0), mask=line < columns)
        else:
            flat = tl.reshape(magnitude, (TILE_ROWS, TILE_COLUMNS))
            line = first_row + tl.arange(0, TILE_ROWS)
            tl.atomic_max(amax_bits + line, tl.max(flat, axis=1), mask=line < rows)
    else:
        tl.atomic_max(amax_bits, tl.max(tl.reshape(magnitude, (TILE_ROWS * TILE_COLUMNS,)), axis=0))
