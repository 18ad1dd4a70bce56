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

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.precision.hadamard import inverse_block_hadamard
from megatron_ext.precision.linear_operands import (
    DGRAD,
    FORWARD,
    LinearSeeds,
    LinearStore,
    Shares,
)
from megatron_ext.precision.linear_recipe import LinearRecipe
from megatron_ext.precision.main_grad import accumulated, float32_main_grad, placeholder_grad
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.reference import read


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
        store = LinearStore(seeds, shares, recipe)
        if recipe.backward_reads == "original" and weight.requires_grad:
            left, kept = store.both(
                rows, (recipe.forward_input, FORWARD), recipe.wgrad_input, "rows"
            )
        else:
            left = kept = store(rows, recipe.forward_input, "rows", FORWARD)
        right = store(weight, recipe.forward_weight, "weight", FORWARD)
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
        needs_rows, needs_weight = ctx.needs_input_grad[:2]
        if needs_rows and needs_weight:
            of_dgrad = recipe.dgrad_grad, DGRAD
            left, of_wgrad = store.both(grad, of_dgrad, recipe.wgrad_grad, "grad")
        elif needs_rows:
            left = store(grad, recipe.dgrad_grad, "grad", DGRAD)
        elif needs_weight:
            of_wgrad = store.tokens_last(grad, recipe.wgrad_grad, "grad")
        if needs_rows:
            used = read(stored[0]) if stored else weight
            right = store(used.t(), recipe.dgrad_weight, "weight", DGRAD)
            grad_rows = store.multiply(
                left, right, out_dtype=torch.float32 if stored else ctx.dtype
            )
            if stored:
                grad_rows = _turned_back(grad_rows, kept, recipe.forward_input, store.seeds)
            grad_rows = grad_rows.to(ctx.dtype)
        if needs_weight and stored:
            right = store.tokens_last(read(kept), recipe.wgrad_input, "rows")
            grad_weight = store.multiply(of_wgrad, right)
            quantizer = recipe.forward_weight
            grad_weight = _turned_back(grad_weight, stored[0], quantizer, store.seeds)
            grad_weight = accumulated(weight, grad_weight)
        elif needs_weight and (buffer := float32_main_grad(weight)) is not None:
            store.multiply(of_wgrad, kept, out=buffer)
            grad_weight = placeholder_grad(weight)
        elif needs_weight:
            grad_weight = accumulated(weight, store.multiply(of_wgrad, kept))
        return grad_rows, grad_weight, None, None, None


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
    return inverse_block_hadamard(grad, quantizer.hadamard_group, seeds.signs(quantizer, FORWARD))


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
