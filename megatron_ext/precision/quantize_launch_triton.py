"""Launching the Triton kernels that quantise: plans of copies, tile sizes, what is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.gemm_config import Target
from megatron_ext.precision.gemm_launch_triton import current_target
from megatron_ext.precision.quantize_kernel_triton import (
    CopyPlan,
    largest_magnitudes,
    quantize_tiles,
)
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import derive_seed, mix_int
from megatron_ext.precision.reference import ReduceAmax, check_groups

Before = Literal["none", "rms_norm", "swiglu"]

_WORD = 1 << 32
# A thread's share of a tile.
_NUMBERS_PER_THREAD = 32


@dataclass(frozen=True, slots=True)
class Source:
    """What is quantised: a matrix [rows, columns], or what becomes of one.

    Attributes:
        matrix: rows [rows, columns], of SwiGLU [rows, 2 * columns]; columns are neighbours.
        weight, rrms: [columns] and float32 [rows], of RMSNorm.
        original: [rows, columns], where the result in the matrix's dtype is kept; None: not kept.
    """

    matrix: Tensor
    before: Before = "none"
    weight: Tensor | None = None
    rrms: Tensor | None = None
    original: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return rows, columns // 2 if self.before == "swiglu" else columns


@dataclass(frozen=True, slots=True)
class TileSize:
    """Numbers of a program, and threads for them."""

    rows: int
    columns: int

    def num_warps(self, warp_size: int) -> int:
        return max(1, min(16, self.rows * self.columns // (_NUMBERS_PER_THREAD * warp_size)))


def tile_size(row: CopyPlan | None, column: CopyPlan | None) -> TileSize:
    """Whole groups and blocks of both copies, and 64 bytes in a row of whatever is written."""
    if column is None:
        assert row is not None
        return TileSize(max(row.block_rows, 32), max(row.group, 128))
    bits = column.quantizer.block_format.element.bits
    rows = max(column.group, 64 * 8 // bits)
    columns = max(column.block_rows, 64)
    if row is not None:
        rows, columns = max(rows, row.block_rows), max(columns, row.group)
    return TileSize(rows, columns)


def converted_elements(target: Target) -> tuple[str, ...]:
    """Elements that a device rounds to in one instruction, to nearest even and saturating."""
    found: tuple[str, ...] = ("e4m3", "e5m2") if target.capability >= 89 else ()
    return (*found, "e2m1") if target.capability >= 100 else found


def copy_plan(
    request: CopyRequest | None, numel: int, converted: tuple[str, ...]
) -> CopyPlan | None:
    if request is None:
        return None
    has_signs = request.signs is not None and request.quantizer.hadamard_group > 1
    return CopyPlan(request.quantizer, has_signs, numel > _WORD, converted)


def launch(
    source: Source,
    row: CopyRequest | None,
    column: CopyRequest | None,
    reduce_amax: ReduceAmax | None,
) -> tuple[Quantized | None, Quantized | None]:
    """Store a source, its transpose, or both.

    Raises:
        ValueError: groups do not divide the columns of a copy.
    """
    rows, columns = source.shape
    target = current_target()
    converted = converted_elements(target)
    plans = [copy_plan(each, rows * columns, converted) for each in (row, column)]
    shapes = ((rows, columns), (columns, rows))
    amax = _amax_of_copies(source, (row, column), plans, reduce_amax)
    stored: list[Quantized | None] = []
    for request, shape in zip((row, column), shapes, strict=True):
        stored.append(None if request is None else _allocated(source, request, shape))
    tile = tile_size(plans[0], plans[1])
    if rows * columns:
        quantize_tiles[_grid(source, tile)](
            *_source_arguments(source),
            source.matrix if source.original is None else source.original,
            *_copy_arguments(source.matrix, stored[0], row, amax[0]),
            *_copy_arguments(source.matrix, stored[1], column, amax[1]),
            rows,
            columns,
            source.matrix.stride(0),
            ROW=plans[0],
            COLUMN=plans[1],
            WRITES=source.original is not None,
            **_constants(source, tile, target),
        )
    return stored[0], stored[1]


def warp_size(target: Target) -> int:
    return 64 if target.backend == "hip" else 32


def _grid(source: Source, tile: TileSize) -> tuple[int]:
    rows, columns = source.shape
    return (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)


def _constants(source: Source, tile: TileSize, target: Target) -> dict[str, Any]:
    return {
        "BEFORE": source.before,
        "NATIVE": target.backend != "interpreter",
        "TILE_ROWS": tile.rows,
        "TILE_COLUMNS": tile.columns,
        "num_warps": tile.num_warps(warp_size(target)),
        # The definition rounds after every operation.
        "enable_fp_fusion": False,
    }


def _source_arguments(source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels do not look at what stands for tensors that there are not."""
    matrix = source.matrix
    weight = matrix if source.weight is None else source.weight
    return matrix, weight, matrix if source.rrms is None else source.rrms


def _copy_arguments(
    unused: Tensor, stored: Quantized | None, request: CopyRequest | None, amax: Tensor | None
) -> tuple[Any, ...]:
    if stored is None or request is None:
        return (*(unused,) * 6, 0, 0)
    tensors = (*stored.tensors(), request.signs, amax)
    keys = (signed_key(request.seed), signed_key(derive_seed(request.seed, 1)))
    return (*(unused if each is None else each for each in tensors), *keys)


def signed_key(seed: int) -> int:
    """`mix_int` of a seed as the int32 of the same bits."""
    word = mix_int(seed & (_WORD - 1))
    return word - _WORD if word >= _WORD // 2 else word


def _allocated(source: Source, request: CopyRequest, shape: tuple[int, int]) -> Quantized:
    rows, columns = shape
    quantizer, device = request.quantizer, source.matrix.device
    block_format = quantizer.block_format
    # What no program reaches: scales of nothing are those of zeros.
    make = torch.empty if rows * columns else torch.zeros
    scale_dtype = torch.float32 if block_format.scale == "fp32" else torch.uint8
    tensor_scale = kept = None
    if quantizer.has_tensor_scale:
        tensor_scale = torch.ones((), dtype=torch.float32, device=device)
    if quantizer.keeps_mask:
        kept = torch.empty(rows, columns // 8, dtype=torch.uint8, device=device)
    per_byte = 8 // block_format.element.bits
    return Quantized(
        block_format,
        torch.empty(rows, columns // per_byte, dtype=torch.uint8, device=device),
        make(block_format.grid(rows, columns), dtype=scale_dtype, device=device),
        tensor_scale,
        kept,
    )


def _is_by_row(quantizer: Quantizer) -> bool:
    return quantizer.block_format.block_rows == 1 and quantizer.block_format.block_columns is None


def _amax_of_copies(
    source: Source,
    requests: tuple[CopyRequest | None, CopyRequest | None],
    plans: list[CopyPlan | None],
    reduce_amax: ReduceAmax | None,
) -> list[Tensor | None]:
    """float32 [1] or [rows of the copy], after a pass over the source; None: not needed."""
    found: list[Tensor | None] = []
    for place, (request, plan) in enumerate(zip(requests, plans, strict=True)):
        if request is None or plan is None:
            found.append(None)
            continue
        _check(source, request, is_turned=place == 1)
        by_row = _is_by_row(request.quantizer)
        if not (by_row or request.quantizer.needs_tensor_amax):
            found.append(None)
        elif place == 1 and found[0] is not None and _is_same_amax(requests):
            found.append(found[0])
        else:
            amax = _largest(source, request, plan, is_turned=place == 1, by_row=by_row)
            if reduce_amax is not None and not by_row:
                amax = reduce_amax(amax.view(())).view(1)
            found.append(amax)
    return found


def _check(source: Source, request: CopyRequest, *, is_turned: bool) -> None:
    columns = source.shape[0 if is_turned else 1]
    check_groups(source.matrix.new_empty(0, columns), request.quantizer)
    if request.quantizer.keeps_mask and columns % 8:
        raise ValueError(f"bits of a mask are packed by eight; a row has {columns}")


def _is_same_amax(requests: tuple[CopyRequest | None, CopyRequest | None]) -> bool:
    """Whether both are of the tensor as it is."""
    quantizers = [request.quantizer for request in requests if request is not None]
    return all(each.hadamard_group == 1 and not _is_by_row(each) for each in quantizers)


def _largest(
    source: Source, request: CopyRequest, plan: CopyPlan, *, is_turned: bool, by_row: bool
) -> Tensor:
    rows, columns = source.shape
    lines = (columns if is_turned else rows) if by_row else 1
    amax = torch.zeros(lines, dtype=torch.float32, device=source.matrix.device)
    tile = tile_size(None, plan) if is_turned else tile_size(plan, None)
    if rows * columns:
        largest_magnitudes[_grid(source, tile)](
            *_source_arguments(source),
            source.matrix if request.signs is None else request.signs,
            amax.view(torch.int32),
            rows,
            columns,
            source.matrix.stride(0),
            P=plan,
            TURNED=is_turned,
            **_constants(source, tile, current_target()),
        )
    return amax
