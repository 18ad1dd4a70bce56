"""Quantising on the CPU: the bits of `reference.quantize` in a fraction of its time.

Formats whose blocks lie along rows are computed with groups on end, group = max(block, Hadamard):
element j of every group is in row j,

    [rows, columns] -> [rows, columns / group, group] -> [group, rows * columns / group]

so that butterflies, sums, maxima and scales of blocks are operations on long contiguous rows, and
a transposed view (wgrad's operands) costs nothing. Other formats keep their order. The scales are
the reference's formulas on few numbers; how elements are rounded is in `encode_cpu.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.precision.block_format import BlockFormat
from megatron_ext.precision.element_format import E4M3
from megatron_ext.precision.encode_cpu import (
    decode_elements,
    encode_elements,
    pack_bits_rows,
    pack_rows,
    uniform_at,
)
from megatron_ext.precision.formats import encode
from megatron_ext.precision.packing import pack, pack_bits
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import derive_seed, uniform_numbers
from megatron_ext.precision.reference import (
    EDEN_FACTOR,
    EDEN_SCALES_MAX,
    FOUR_OVER_SIX_SCALES_MAX,
    HEADROOM,
    QUEST_FACTOR,
    SQRT_2,
    ReduceAmax,
    check_groups,
)
from megatron_ext.precision.reference import quantize as quantize_reference
from megatron_ext.precision.scales import (
    SMALLEST_SCALE,
    ceil_power_of_two,
    decode_e8m0,
    decode_scale_e4m3,
    encode_e8m0,
    encode_scale_e4m3,
    floor_power_of_two,
    reciprocal,
)


def quantize_cpu(
    matrix: Tensor,
    quantizer: Quantizer,
    *,
    seed: int = 0,
    signs: Tensor | None = None,
    reduce_amax: ReduceAmax | None = None,
) -> Quantized:
    """Store a matrix; arguments, result and errors as `reference.quantize`, bit for bit."""
    check_groups(matrix, quantizer)
    columns = matrix.shape[1]
    block_format = quantizer.block_format
    if block_format.block_rows == 1 and block_format.block_columns is not None:
        group = max(quantizer.hadamard_group, block_format.block_columns)
        if columns % group == 0 and matrix.numel():
            return _OnEnd(matrix, quantizer, group, seed).store(signs, reduce_amax)
    is_square = block_format.block_rows == block_format.block_columns
    if not is_square or quantizer.hadamard_group > 1 or quantizer.scale_rule != "absmax":
        return quantize_reference(
            matrix, quantizer, seed=seed, signs=signs, reduce_amax=reduce_amax
        )
    return _store_squares(matrix, quantizer, seed, reduce_amax)


def _store_squares(
    matrix: Tensor, quantizer: Quantizer, seed: int, reduce_amax: ReduceAmax | None
) -> Quantized:
    """Square blocks or the tensor, in the matrix's own order."""
    rows, columns = matrix.shape
    block_format = quantizer.block_format
    side = block_format.block_rows
    if quantizer.tries_four or not matrix.numel() or (side and (rows % side or columns % side)):
        return quantize_reference(matrix, quantizer, seed=seed, reduce_amax=reduce_amax)
    down, across = block_format.grid(rows, columns)
    values = matrix.to(torch.float32, memory_format=torch.contiguous_format)
    blocks = values.view(down, rows // down, across, columns // across)
    largest = blocks.abs().amax(dim=1).amax(dim=-1)
    if side is None and reduce_amax is not None:
        largest = reduce_amax(largest.view(())).view(1, 1)
    tensor_scale = _tensor_scale(largest, quantizer, reduce_amax)
    scales = _written(_ideal_of_amax(largest, quantizer), quantizer, tensor_scale)
    factors = reciprocal(_block_scales(block_format, scales, tensor_scale))
    scaled = (blocks * factors[:, None, :, None]).view(rows, columns)
    uniform = None
    if quantizer.rounding == "stochastic":
        uniform = uniform_at(seed, (rows, columns), (columns, 1))
    codes = encode_elements(scaled, block_format.element, uniform, factors)
    kept = None
    if quantizer.keeps_mask:
        kept = pack_bits(scaled.abs() < block_format.element.max_value)
    codes = pack(codes) if block_format.is_packed else codes
    return Quantized(block_format, codes, scales, tensor_scale, kept)


@dataclass(slots=True)
class _OnEnd:
    """One matrix with its groups on end: float32 [group, groups], groups in memory's order."""

    matrix: Tensor
    quantizer: Quantizer
    group: int
    seed: int

    @property
    def num_groups(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return rows, columns // self.group

    @property
    def is_turned(self) -> bool:
        """A transposed view: neighbours in memory are of different rows."""
        return self.matrix.stride(0) == 1 and self.matrix.shape[0] > 1

    def store(self, signs: Tensor | None, reduce_amax: ReduceAmax | None) -> Quantized:
        quantizer, block_format = self.quantizer, self.quantizer.block_format
        values = self._transformed(signs)
        block = block_format.block_columns
        assert block is not None
        blocks = values.view(self.group // block, block, -1)
        amax = None
        if quantizer.scale_rule != "quest" or block_format.has_tensor_scale:
            amax = blocks.abs().amax(dim=1)
        tensor_scale = _tensor_scale(amax, quantizer, reduce_amax)
        ideal = _quest_scales(blocks) if quantizer.scale_rule == "quest" else None
        if ideal is None:
            assert amax is not None
            ideal = _ideal_of_amax(amax, quantizer)
        scales = _written(ideal, quantizer, tensor_scale)
        if quantizer.tries_four:
            scales = _four_or_six(blocks, scales, ideal, quantizer, tensor_scale)
        used = _block_scales(block_format, scales, tensor_scale)
        factors = reciprocal(used)
        scaled = (blocks * factors[:, None]).view(self.group, -1)
        codes = encode_elements(scaled, block_format.element, self._uniform(), factors)
        kept = None
        if quantizer.keeps_mask:
            kept = self._in_rows(pack_bits_rows(scaled.abs() < block_format.element.max_value))
        if quantizer.scale_rule == "eden":
            found = decode_elements(codes, block_format.element).view_as(blocks)
            scales = self._unbiased(values, found.mul_(used[:, None]), scales)
        codes = pack_rows(codes) if block_format.is_packed else codes
        return Quantized(
            block_format, self._in_rows(codes), self._in_rows(scales), tensor_scale, kept
        )

    def _transformed(self, signs: Tensor | None) -> Tensor:
        """float32 [group, groups] in the basis in which it is rounded."""
        rows, across = self.num_groups
        if self.is_turned:
            on_end = self.matrix.t().reshape(across, self.group, rows).transpose(0, 1)
        else:
            on_end = self.matrix.reshape(rows * across, self.group).t()
        values = torch.empty(self.group, rows * across)
        values.view(on_end.shape).copy_(on_end)
        size = self.quantizer.hadamard_group
        return values if size == 1 else _butterflies(values, size, signs)

    def _uniform(self) -> Tensor | None:
        """Random numbers of the elements where they stand now."""
        if self.quantizer.rounding == "nearest":
            return None
        rows, across = self.num_groups
        columns = self.matrix.shape[1]
        strides = {"row": columns, "across": self.group, "inside": 1}
        order = ("inside", "across", "row") if self.is_turned else ("inside", "row", "across")
        sizes = {"row": rows, "across": across, "inside": self.group}
        uniform = uniform_at(
            self.seed, tuple(sizes[each] for each in order), tuple(strides[each] for each in order)
        )
        return uniform.view(self.group, -1)

    def _in_rows(self, values: Tensor) -> Tensor:
        """[n, groups] -> [rows, columns / group * n]."""
        rows, across = self.num_groups
        count = values.shape[0]
        turned = values.view(count, across, rows).permute(2, 1, 0) if self.is_turned else values.t()
        return turned.reshape(rows, across * count).contiguous()

    def _unbiased(self, values: Tensor, found: Tensor, scales: Tensor) -> Tensor:
        """EDEN: as `reference._unbiased_scales`."""
        found = found.view_as(values)
        length, overlap = _tree_sum(values * values, 0), _tree_sum(values * found, 0)
        factor = torch.where(overlap > 0, length / overlap, 1.0)
        rows, across = self.num_groups
        count = scales.shape[0]
        grown = self._in_rows(decode_scale_e4m3(scales) * factor)
        uniform = uniform_numbers(derive_seed(self.seed, 1), (rows, across * count))
        codes = encode(grown, E4M3, uniform)
        # Back on end, as all scales are until the very last.
        on_end = codes.view(rows, across, count).permute(
            *((2, 1, 0) if self.is_turned else (2, 0, 1))
        )
        return on_end.reshape(count, -1)


def _butterflies(values: Tensor, size: int, signs: Tensor | None) -> Tensor:
    """`block_hadamard` down the columns: float32 [group, groups]."""
    group, width = values.shape
    if signs is not None:
        values.view(-1, size, width).mul_(signs[:, None])
    spare = torch.empty_like(values)
    span = 1
    while span < size:
        shape = (group // (2 * span), 2, span, width)
        old, new = values.view(shape), spare.view(shape)
        torch.add(old[:, 0], old[:, 1], out=new[:, 0])
        torch.sub(old[:, 0], old[:, 1], out=new[:, 1])
        values, spare = spare, values
        span *= 2
    return values.mul_(1.0 / math.sqrt(size))


def _tree_sum(values: Tensor, dim: int) -> Tensor:
    """`reference.tree_sum` over another dim, whose size is a power of two."""
    while values.shape[dim] > 1:
        shape = values.shape
        pairs = values.view(*shape[:dim], shape[dim] // 2, 2, *shape[dim + 1 :])
        values = pairs.select(dim + 1, 0) + pairs.select(dim + 1, 1)
    return values.squeeze(dim)


def _quest_scales(blocks: Tensor) -> Tensor:
    """blocks: [blocks of a group, block, groups] -> one scale a block."""
    share = 1.0 / blocks.shape[1]
    mean = _tree_sum(blocks, 1) * share
    variance = (_tree_sum(blocks * blocks, 1) * share - mean.square()).clamp(min=0.0)
    return floor_power_of_two(variance.sqrt() * (QUEST_FACTOR * SQRT_2))


def _ideal_of_amax(largest: Tensor, quantizer: Quantizer) -> Tensor:
    block_format = quantizer.block_format
    if block_format.scale == "e8m0" and not quantizer.rounds_scale_up:
        return floor_power_of_two(largest) * 2.0**-block_format.element.max_exponent
    scales = largest * (1.0 / block_format.element.max_value)
    if quantizer.scale_rule == "eden":
        scales = scales * EDEN_FACTOR
    if block_format.scale == "e8m0" or quantizer.power_of_two_scales:
        return ceil_power_of_two(scales)
    return scales


def _tensor_scale(
    amax: Tensor | None, quantizer: Quantizer, reduce_amax: ReduceAmax | None
) -> Tensor | None:
    """amax: of blocks."""
    if quantizer.scale_rule == "headroom":
        return torch.full((), HEADROOM)
    if not quantizer.block_format.has_tensor_scale:
        return None
    assert amax is not None
    largest = amax.amax()
    if reduce_amax is not None:
        largest = reduce_amax(largest)
    factor, scales_max = 1.0, E4M3.max_value
    if quantizer.scale_rule == "eden":
        factor, scales_max = EDEN_FACTOR, EDEN_SCALES_MAX
    elif quantizer.tries_four:
        scales_max = FOUR_OVER_SIX_SCALES_MAX
    scale = largest * (factor / (scales_max * quantizer.block_format.element.max_value))
    return torch.where(scale < SMALLEST_SCALE, 1.0, scale)


def _written(ideal: Tensor, quantizer: Quantizer, tensor_scale: Tensor | None) -> Tensor:
    """Scales as they are stored."""
    kind = quantizer.block_format.scale
    if kind == "e8m0":
        return encode_e8m0(ideal)
    if kind == "fp32":
        return ideal
    assert tensor_scale is not None
    return encode_scale_e4m3(ideal * reciprocal(tensor_scale))


def _block_scales(block_format: BlockFormat, scales: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """`Quantized.block_scales` of scales in any order."""
    if block_format.scale == "e8m0":
        scales = decode_e8m0(scales)
    elif block_format.scale == "e4m3":
        scales = decode_scale_e4m3(scales)
    return scales if tensor_scale is None else scales * tensor_scale


def _four_or_six(
    blocks: Tensor,
    codes: Tensor,
    ideal: Tensor,
    quantizer: Quantizer,
    tensor_scale: Tensor | None,
) -> Tensor:
    """Of two scales of each block, codes of the one with the smaller square error."""
    assert tensor_scale is not None
    element = quantizer.block_format.element
    wider = encode_scale_e4m3(ideal * reciprocal(tensor_scale) * 1.5)
    errors = []
    for each in (codes, wider):
        scales = decode_scale_e4m3(each) * tensor_scale
        factors = reciprocal(scales)
        found = encode_elements((blocks * factors[:, None]).flatten(0, 1), element, None, factors)
        nearest = decode_elements(found, element).view_as(blocks)
        error = blocks - nearest.mul_(scales[:, None])
        errors.append(_tree_sum(error.mul_(error), 1))
    return torch.where(errors[1] < errors[0], wider, codes)
