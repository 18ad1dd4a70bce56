"""A linear layer whose three products are of few bits.

    y = x w^T,  dx = dy w,  dw = dy^T x        each operand stored as its recipe says

The forward pass keeps the input as wgrad will multiply it, in few bits (or, where backward reads
what forward stored, that), never the input itself; the weight is a parameter and there anyway.

With "stored" (Quartet): forward multiplies X = Q(x S H), W = Q(w S H); the products of backward
contract over other dims and leave the basis of K, so both gradients come in it:

    dx = ((dy W) * mask_x) H S,      dw = ((dy^T X) * mask_w) H S

Tokens are contracted by wgrad; where their number is no multiple of a group they are filled up with
zeros, which add nothing. Features must be multiples: ValueError with the layer's sizes.

Source of the saved tensors and the order: papers in `linear_recipe.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.precision.gemm import multiply
from megatron_ext.precision.hadamard import inverse_block_hadamard
from megatron_ext.precision.linear_recipe import BackendName, LinearRecipe
from megatron_ext.precision.quantize import quantize
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import derive_seed, random_signs
from megatron_ext.precision.reference import ReduceAmax, read

_Matrix = Literal["rows", "weight", "grad"]
_MATRICES: tuple[_Matrix, ...] = ("rows", "weight", "grad")
_FORWARD, _DGRAD, _WGRAD = range(3)


@dataclass(frozen=True, slots=True)
class LinearSeeds:
    """Where the random numbers of one pass through one layer come from.

    Attributes:
        run: fixed sign vectors follow from it, the same in all layers and steps.
        each_pass: rounding and fresh signs follow from it; the same on all tensor-parallel ranks
            for signs, and different for rounding (`rank`).
    """

    run: int
    each_pass: int
    rank: int = 0

    def signs(self, quantizer: Quantizer | None, product: int) -> Tensor | None:
        """Both operands of a product have the same."""
        if quantizer is None or quantizer.signs == "none" or quantizer.hadamard_group == 1:
            return None
        base = self.run if quantizer.signs == "fixed" else self.each_pass
        return random_signs(derive_seed(base, product, 7), quantizer.hadamard_group)

    def rounding(self, product: int, operand: int) -> int:
        return derive_seed(self.each_pass, self.rank, product, operand)


@dataclass(frozen=True, slots=True)
class Shares:
    """Which of the three matrices are one rank's part of a larger one, and how amax is agreed on.

    Attributes:
        split: the features that are spread over ranks: "out" (column-parallel: weight and the
            gradient are parts) or "in" (row-parallel: weight and the input).
        reduce_amax: the maximum over those ranks.
    """

    split: Literal["out", "in"]
    reduce_amax: ReduceAmax

    def of(self, matrix: _Matrix) -> ReduceAmax | None:
        is_whole = matrix == ("rows" if self.split == "out" else "grad")
        return None if is_whole else self.reduce_amax


def low_precision_linear(
    rows: Tensor,
    weight: Tensor,
    recipe: LinearRecipe,
    seeds: LinearSeeds,
    *,
    shares: Shares | None = None,
) -> Tensor:
    """rows weight^T.

    Args:
        rows: [num_tokens, in_size], bf16 or float32.
        weight: [out_size, in_size]. Where it has a float32 `main_grad` (megatron's buffer), the
            weight's gradient is added there without being rounded to the weight's dtype first.
        shares: None where this rank has whole matrices.

    Returns:
        [num_tokens, out_size], dtype of rows.

    Raises:
        ValueError: a feature dim is no multiple of a block or Hadamard group.
    """
    result: Tensor = _LowPrecisionLinear.apply(  # type: ignore[no-untyped-call]
        rows, weight, recipe, seeds, shares
    )
    return result


class _LowPrecisionLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        recipe: LinearRecipe,
        seeds: LinearSeeds,
        shares: Shares | None,
    ) -> Tensor:
        store = _Store(seeds, shares, recipe.backend)
        left = store(rows, recipe.forward_input, "rows", _FORWARD)
        right = store(weight, recipe.forward_weight, "weight", _FORWARD)
        kept: Quantized | Tensor = left
        if recipe.backward_reads == "original":
            kept = store.tokens_last(rows, recipe.wgrad_input, "rows")
        ctx.recipe, ctx.store, ctx.dtype = recipe, store, rows.dtype
        ctx.weight_is_stored = recipe.backward_reads == "stored"
        saved, ctx.formats = _flatten((kept, right) if ctx.weight_is_stored else (kept,))
        ctx.save_for_backward(weight, *saved)
        return store.multiply(left, right, out_dtype=rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        recipe, store = ctx.recipe, ctx.store
        weight, *saved = ctx.saved_tensors
        kept, *stored = _unflatten(saved, ctx.formats)
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            used = read(stored[0]) if stored else weight
            left = store(grad, recipe.dgrad_grad, "grad", _DGRAD)
            right = store(used.t(), recipe.dgrad_weight, "weight", _DGRAD)
            grad_rows = store.multiply(
                left, right, out_dtype=torch.float32 if stored else ctx.dtype
            )
            if stored:
                grad_rows = _turned_back(grad_rows, kept, recipe.forward_input, store.seeds)
            grad_rows = grad_rows.to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            left = store.tokens_last(grad, recipe.wgrad_grad, "grad")
            right = kept
            if stored:
                right = store.tokens_last(read(kept), recipe.wgrad_input, "rows")
            grad_weight = store.multiply(left, right)
            if stored:
                quantizer = recipe.forward_weight
                grad_weight = _turned_back(grad_weight, stored[0], quantizer, store.seeds)
            grad_weight = _accumulated(weight, grad_weight)
        return grad_rows, grad_weight, None, None, None


@dataclass(frozen=True, slots=True)
class _Store:
    """Quantises the operands of one pass, and multiplies them."""

    seeds: LinearSeeds
    shares: Shares | None
    backend: BackendName

    def __call__(
        self, matrix: Tensor, quantizer: Quantizer | None, name: _Matrix, product: int
    ) -> Quantized | Tensor:
        if quantizer is None:
            return matrix
        return quantize(
            matrix,
            quantizer,
            seed=self.seeds.rounding(product, _MATRICES.index(name)),
            signs=self.seeds.signs(quantizer, product),
            reduce_amax=None if self.shares is None else self.shares.of(name),
            backend=self.backend,
        )

    def multiply(
        self,
        left: Quantized | Tensor,
        right: Quantized | Tensor,
        *,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        return multiply(left, right, out_dtype=out_dtype, backend=self.backend)

    def tokens_last(
        self, rows: Tensor, quantizer: Quantizer | None, name: _Matrix
    ) -> Quantized | Tensor:
        """An operand of wgrad: [features, tokens], tokens filled up to whole groups."""
        missing = 0 if quantizer is None else -len(rows) % quantizer.group
        return self(F.pad(rows.t(), (0, missing)), quantizer, name, _WGRAD)


def _accumulated(weight: Tensor, grad: Tensor) -> Tensor:
    """Add the gradient to megatron's float32 buffer; what autograd gets then counts for nothing."""
    if not hasattr(weight, "grad_added_to_main_grad") or not hasattr(weight, "main_grad"):
        return grad.to(weight.dtype)
    weight.main_grad.add_(grad)
    weight.grad_added_to_main_grad = True
    # Hooks that start reductions wait for a gradient of some kind.
    return torch.zeros((), dtype=weight.dtype, device=weight.device).expand_as(weight)


def _turned_back(
    grad: Tensor, stored: Quantized | Tensor, quantizer: Quantizer | None, seeds: LinearSeeds
) -> Tensor:
    """Gradient of what was stored -> gradient of what it was made of."""
    if not isinstance(stored, Quantized) or quantizer is None:
        return grad
    if (mask := stored.mask()) is not None:
        grad = grad * mask
    if quantizer.hadamard_group == 1:
        return grad
    return inverse_block_hadamard(grad, quantizer.hadamard_group, seeds.signs(quantizer, _FORWARD))


def _flatten(operands: tuple[Quantized | Tensor, ...]) -> tuple[list[Tensor | None], list[Any]]:
    """Tensors for autograd, and what else it takes to put the operands together again."""
    tensors: list[Tensor | None] = []
    formats: list[Any] = []
    for operand in operands:
        if isinstance(operand, Quantized):
            tensors += operand.tensors()
            formats.append(operand.block_format)
        else:
            tensors.append(operand)
            formats.append(None)
    return tensors, formats


def _unflatten(tensors: list[Tensor | None], formats: list[Any]) -> list[Any]:
    operands: list[Any] = []
    start = 0
    for block_format in formats:
        if block_format is None:
            operands.append(tensors[start])
            start += 1
        else:
            four = tensors[start], tensors[start + 1], tensors[start + 2], tensors[start + 3]
            operands.append(Quantized.from_tensors(block_format, four))
            start += 4
    return operands
