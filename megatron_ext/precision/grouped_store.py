"""Storing the matrices of all experts of a rank in few bits.

Blocks never reach over two experts. Where they lie in one row and no scale is that of a tensor, all
experts are stored in one call; else each expert is, with a scale of its own:

    rows      [T, K]       tokens sorted by expert
    stacked   [E, N, K]    weights
    columns   [N, T']      tokens last, each expert's filled up with zeros to whole groups

All experts have the same Hadamard signs, whichever rank they are on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.precision.grouped_quantized import GroupedQuantized, Layout, joined
from megatron_ext.precision.linear_operands import WGRAD, LinearSeeds, token_group
from megatron_ext.precision.linear_recipe import LinearRecipe
from megatron_ext.precision.packing import unpack_bits
from megatron_ext.precision.quantize import quantize
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import derive_seed

_StoreOne = Callable[[Tensor, int | None], Quantized]
"""Stores the matrix of all experts (None), or that of one."""


@dataclass(frozen=True, slots=True)
class GroupedStored:
    """What is multiplied, and bits of what was clipped: uint8, shape of the matrix but for the last
    dim, which is an eighth; None: not asked for."""

    operand: GroupedQuantized
    kept: Tensor | None

    def mask(self) -> Tensor | None:
        """bool, shape of the matrix, False where a value was clipped."""
        return None if self.kept is None else unpack_bits(self.kept)


@dataclass(frozen=True)
class GroupedStore:
    """Quantises the operands of one pass through all experts.

    Attributes:
        counts: tokens of each expert.
    """

    seeds: LinearSeeds
    recipe: LinearRecipe
    counts: tuple[int, ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Of each expert's tokens, and their number: in `rows`."""
        return tuple(accumulate(self.counts, initial=0))

    @cached_property
    def filled_starts(self) -> tuple[int, ...]:
        """The same in `columns`."""
        group = token_group(self.recipe)
        return tuple(accumulate((count + -count % group for count in self.counts), initial=0))

    def rows(
        self, rows: Tensor, quantizer: Quantizer, *, product: int, matrix: int
    ) -> GroupedStored:
        """rows: [T, K]."""
        store = self._store_one(quantizer, product, matrix)
        if is_stored_at_once(quantizer):
            return self._at_once(store(rows, None), "rows")
        parts = [rows[first:last] for first, last in pairwise(self.starts)]
        return _each(parts, quantizer, store, "rows")

    def stacked(self, weight: Tensor, quantizer: Quantizer, *, product: int) -> GroupedStored:
        """weight: [E, N, K]."""
        store = self._store_one(quantizer, product, _WEIGHT)
        if is_stored_at_once(quantizer):
            return self._at_once(store(weight.flatten(0, 1), None), "stacked")
        return _each(weight.unbind(), quantizer, store, "stacked")

    def columns(self, rows: Tensor, quantizer: Quantizer, *, matrix: int) -> GroupedStored:
        """An operand of wgrad. rows: [T, N]."""
        store = self._store_one(quantizer, WGRAD, matrix)
        starts = self.filled_starts
        filled = self._filled(rows)
        if is_stored_at_once(quantizer) and quantizer.block_format.block_columns is not None:
            return self._at_once(store(filled.t(), None), "columns")
        parts = [filled[first:last].t() for first, last in pairwise(starts)]
        return _each(parts, quantizer, store, "columns")

    def _filled(self, rows: Tensor) -> Tensor:
        """[T, N] -> [T', N], zeros after each expert's tokens."""
        if self.starts == self.filled_starts:
            return rows
        parts = []
        for (first, last), (start, end) in zip(
            pairwise(self.starts), pairwise(self.filled_starts), strict=True
        ):
            parts.append(F.pad(rows[first:last], (0, 0, 0, end - start - (last - first))))
        return torch.cat(parts)

    def _store_one(self, quantizer: Quantizer, product: int, matrix: int) -> _StoreOne:
        seed = self.seeds.rounding(product, matrix)
        signs = self.seeds.signs(quantizer, product)

        def store(values: Tensor, expert: int | None) -> Quantized:
            own = seed if expert is None else derive_seed(seed, expert)
            return quantize(values, quantizer, seed=own, signs=signs, backend=self.recipe.backend)

        return store

    def _at_once(self, stored: Quantized, layout: Layout) -> GroupedStored:
        codes, scales, kept = stored.codes, stored.scales, stored.kept
        num_experts = len(self.counts)
        if layout == "stacked":
            codes = codes.view(num_experts, -1, codes.shape[1])
            scales = scales.view(num_experts, -1, scales.shape[1])
            kept = None if kept is None else kept.view(num_experts, -1, kept.shape[1])
        tensor_scale = stored.tensor_scale
        if tensor_scale is not None:
            # Not of any tensor: the same for all (`headroom`).
            tensor_scale = tensor_scale.repeat(num_experts)
        block_format = stored.block_format
        return GroupedStored(
            GroupedQuantized(block_format, layout, codes, scales, tensor_scale), kept
        )


_WEIGHT = 1


def is_stored_at_once(quantizer: Quantizer) -> bool:
    """Whether all experts' matrices are stored by one call: no scale is that of several rows."""
    return quantizer.block_format.block_rows == 1 and not quantizer.needs_tensor_amax


def _each(
    parts: Sequence[Tensor], quantizer: Quantizer, store: _StoreOne, layout: Layout
) -> GroupedStored:
    stored = [
        store(part, expert) if part.numel() else _nothing(part, quantizer, store)
        for expert, part in enumerate(parts)
    ]
    kept = [each.kept for each in stored if each.kept is not None]
    joined_kept = None
    if kept:
        joined_kept = torch.stack(kept) if layout == "stacked" else torch.cat(kept)
    return GroupedStored(joined(stored, layout), joined_kept)


def _nothing(part: Tensor, quantizer: Quantizer, store: _StoreOne) -> Quantized:
    """Of an expert without tokens, which has no largest magnitude: zeros, all cut off again."""
    rows, columns = part.shape
    some = store(part.new_zeros(rows or 1, columns or max(quantizer.group, 128)), None)
    block_format = some.block_format
    down = rows if block_format.block_rows == 1 else None
    across = 0 if block_format.block_columns and not columns else None
    return Quantized(
        block_format,
        some.codes[:rows] if columns else some.codes[:, :0],
        some.scales[:down, :across],
        some.tensor_scale,
        None if some.kept is None else some.kept[:rows],
    )
