"""A matrix as it is stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ext.precision.block_format import BlockFormat
from megatron_ext.precision.formats import decode
from megatron_ext.precision.packing import pack, pack_bits, unpack, unpack_bits
from megatron_ext.precision.scales import decode_e8m0, decode_scale_e4m3


@dataclass(frozen=True, slots=True)
class Quantized:
    """Codes and scales of a matrix [rows, columns]; products contract over the columns.

    Attributes:
        codes: uint8 [rows, columns]; 4-bit formats: [rows, columns / 2], two in each byte.
        scales: of blocks, [down, across] (`BlockFormat.grid`): float32, or uint8 codes of E8M0
            or E4M3.
        tensor_scale: float32 [], or None where the format has none.
        kept: uint8 [rows, columns / 8], a bit an element: 0 where a value was clipped; None: not
            asked for.
    """

    block_format: BlockFormat
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None
    kept: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns * (2 if self.block_format.is_packed else 1)

    def block_scales(self) -> Tensor:
        """What decoded codes are multiplied with: float32 [down, across]."""
        if self.block_format.scale == "e8m0":
            scales = decode_e8m0(self.scales)
        elif self.block_format.scale == "e4m3":
            scales = decode_scale_e4m3(self.scales)
        else:
            scales = self.scales
        return scales if self.tensor_scale is None else scales * self.tensor_scale

    def values(self) -> Tensor:
        """float32 [rows, columns]: decode(code) * scale."""
        codes = unpack(self.codes) if self.block_format.is_packed else self.codes
        rows, columns = self.shape
        scales = spread(self.block_scales(), self.block_format, rows, columns)
        return decode(codes, self.block_format.element) * scales

    def transposed(self) -> Quantized:
        """The transpose, for formats whose blocks are square (ValueError else)."""
        if not self.block_format.transposes():
            raise ValueError(
                f"{self.block_format.name} has blocks along rows; quantize the transpose instead"
            )
        codes = unpack(self.codes) if self.block_format.is_packed else self.codes
        codes = codes.t().contiguous()
        if self.block_format.is_packed:
            codes = pack(codes)
        kept = None if self.kept is None else pack_bits(unpack_bits(self.kept).t())
        return replace(self, codes=codes, scales=self.scales.t().contiguous(), kept=kept)

    def mask(self) -> Tensor | None:
        """bool [rows, columns], False where a value was clipped; None: not asked for."""
        return None if self.kept is None else unpack_bits(self.kept)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd keeps; `with_tensors` puts it back."""
        return self.codes, self.scales, self.tensor_scale, self.kept

    @staticmethod
    def from_tensors(block_format: BlockFormat, tensors: tuple[Tensor | None, ...]) -> Quantized:
        codes, scales, tensor_scale, kept = tensors
        assert codes is not None
        assert scales is not None
        return Quantized(block_format, codes, scales, tensor_scale, kept)

    def num_bytes(self) -> int:
        tensors = [tensor for tensor in self.tensors() if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def spread(scales: Tensor, block_format: BlockFormat, rows: int, columns: int) -> Tensor:
    """One number a block -> one an element, as a view where a row or the tensor has one scale.

    Args:
        scales: [down, across].

    Returns:
        [rows or 1, columns or 1], to be broadcast.
    """
    if block_format.block_rows not in (None, 1):
        scales = torch.repeat_interleave(scales, block_format.block_rows, dim=0)[:rows]
    if block_format.block_columns not in (None, 1):
        scales = torch.repeat_interleave(scales, block_format.block_columns, dim=1)[:, :columns]
    return scales
