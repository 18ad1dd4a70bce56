"""The linear layers of all experts of a rank as three grouped products of few bits.

    y[t] = x[t] w[e]^T,   dx[t] = dy[t] w[e],   dw[e] = dy[t]^T x[t] summed over expert e's tokens

As `linear.py` for one layer: kept for backward is the input as wgrad multiplies it, in few bits;
the weights' gradients are added to megatron's float32 buffer as they are made.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.precision.grouped_gemm import grouped_multiply
from megatron_ext.precision.grouped_quantized import GroupedQuantized
from megatron_ext.precision.grouped_store import GroupedStore, GroupedStored
from megatron_ext.precision.hadamard import inverse_block_hadamard
from megatron_ext.precision.linear import low_precision_linear
from megatron_ext.precision.linear_operands import DGRAD, FORWARD, LinearSeeds, token_group
from megatron_ext.precision.linear_recipe import LinearRecipe
from megatron_ext.precision.main_grad import accumulated, float32_main_grad, placeholder_grad
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import derive_seed

_ROWS, _GRAD = 0, 2


def grouped_linear(
    rows: Tensor, weight: Tensor, recipe: LinearRecipe, seeds: LinearSeeds, counts: tuple[int, ...]
) -> Tensor:
    """rows of expert e times weight[e]^T.

    A recipe that leaves an operand in its dtype, and `scaled_mm`, have no grouped product: then
    experts are multiplied one after another.

    Args:
        rows: [num_rows, in_size], those of the first expert first; at least one.
        weight: [num_experts, out_size, in_size]; `main_grad` as in `low_precision_linear`.
        counts: rows of each expert; 0 is fine.

    Returns:
        [num_rows, out_size], dtype of rows.

    Raises:
        ValueError: a feature dim is no multiple of a block or Hadamard group.
    """
    if None in recipe.operands().values() or recipe.backend == "scaled_mm":
        return _one_by_one(rows, weight, recipe, seeds, counts)
    result: Tensor = _GroupedLinear.apply(  # type: ignore[no-untyped-call]
        rows, weight, recipe, seeds, counts
    )
    return result


def _one_by_one(
    rows: Tensor, weight: Tensor, recipe: LinearRecipe, seeds: LinearSeeds, counts: tuple[int, ...]
) -> Tensor:
    parts = torch.split(rows, list(counts))
    # An expert without rows gets gradient 0: unbinding fills in what nothing was made of.
    outputs = [
        low_precision_linear(
            part, one, recipe, replace(seeds, rank=derive_seed(seeds.rank, expert, 1))
        )
        for expert, (part, one) in enumerate(zip(parts, weight.unbind(), strict=True))
        if len(part)
    ]
    return torch.cat(outputs)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        recipe: LinearRecipe,
        seeds: LinearSeeds,
        counts: tuple[int, ...],
    ) -> Tensor:
        store = GroupedStore(seeds, recipe, counts)
        left = store.rows(rows, _of(recipe.forward_input), product=FORWARD, matrix=_ROWS)
        right = store.stacked(weight, _of(recipe.forward_weight), product=FORWARD)
        saved = [left, right]
        if recipe.backward_reads == "original":
            saved = [store.columns(rows, _of(recipe.wgrad_input), matrix=_ROWS)]
        ctx.store, ctx.dtype = store, rows.dtype
        ctx.formats = [(each.operand.block_format, each.operand.layout) for each in saved]
        ctx.save_for_backward(weight, *(tensor for each in saved for tensor in _tensors(each)))
        starts = _on_device(store.starts, rows)
        return grouped_multiply(
            left.operand, right.operand, starts, out_dtype=rows.dtype, backend=recipe.backend
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        store: GroupedStore = ctx.store
        weight, *tensors = ctx.saved_tensors
        saved = [
            _stored(block_format, layout, tensors[4 * index : 4 * index + 4])
            for index, (block_format, layout) in enumerate(ctx.formats)
        ]
        grad_rows = grad_weight = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            grad_rows = _dgrad(store, grad, weight, saved).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _wgrad(store, grad, weight, saved)
        return grad_rows, grad_weight, None, None, None


def _dgrad(store: GroupedStore, grad: Tensor, weight: Tensor, saved: list[GroupedStored]) -> Tensor:
    """float32 or bf16 [T, in]."""
    recipe = store.recipe
    is_stored = recipe.backward_reads == "stored"
    used = _values(saved[1].operand, store.starts) if is_stored else weight
    left = store.rows(grad, _of(recipe.dgrad_grad), product=DGRAD, matrix=_GRAD)
    right = store.stacked(used.transpose(1, 2), _of(recipe.dgrad_weight), product=DGRAD)
    product = grouped_multiply(
        left.operand,
        right.operand,
        _on_device(store.starts, grad),
        out_dtype=torch.float32 if is_stored else grad.dtype,
        backend=recipe.backend,
    )
    return _turned_back(product, saved[0], recipe.forward_input, store) if is_stored else product


def _wgrad(store: GroupedStore, grad: Tensor, weight: Tensor, saved: list[GroupedStored]) -> Tensor:
    """What autograd gets: the gradient, or nothing where it was added to megatron's buffer."""
    recipe = store.recipe
    is_stored = recipe.backward_reads == "stored"
    left = store.columns(grad, _of(recipe.wgrad_grad), matrix=_GRAD)
    right = saved[0]
    if is_stored:
        rows = _values(saved[0].operand, store.starts)
        right = store.columns(rows, _of(recipe.wgrad_input), matrix=_ROWS)
    buffer = None if is_stored else float32_main_grad(weight)
    product = grouped_multiply(
        left.operand,
        right.operand,
        _on_device(store.filled_starts, grad),
        out=buffer,
        alignment=token_group(recipe),
        backend=recipe.backend,
    )
    if buffer is not None:
        return placeholder_grad(weight)
    if is_stored:
        product = _turned_back(product, saved[1], recipe.forward_weight, store)
    return accumulated(weight, product)


def _turned_back(
    grad: Tensor, stored: GroupedStored, quantizer: Quantizer | None, store: GroupedStore
) -> Tensor:
    """Gradient of what was stored -> gradient of what it was made of."""
    assert quantizer is not None
    if (mask := stored.mask()) is not None:
        grad = grad * mask
    if quantizer.hadamard_group == 1:
        return grad
    signs = store.seeds.signs(quantizer, FORWARD)
    return inverse_block_hadamard(grad, quantizer.hadamard_group, signs)


def _values(operand: GroupedQuantized, starts: tuple[int, ...]) -> Tensor:
    """float32 [T, K] or [E, N, K]."""
    parts = [
        operand.part(expert, first, last).values()
        for expert, (first, last) in enumerate(pairwise(starts))
    ]
    return torch.stack(parts) if operand.layout == "stacked" else torch.cat(parts)


def _of(quantizer: Quantizer | None) -> Quantizer:
    assert quantizer is not None
    return quantizer


def _on_device(starts: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(starts, dtype=torch.int64, device=like.device)


def _tensors(stored: GroupedStored) -> tuple[Tensor | None, ...]:
    operand = stored.operand
    return operand.codes, operand.scales, operand.tensor_scale, stored.kept


def _stored(block_format: Any, layout: Any, tensors: list[Tensor | None]) -> GroupedStored:
    codes, scales, tensor_scale, kept = tensors
    assert codes is not None
    assert scales is not None
    return GroupedStored(GroupedQuantized(block_format, layout, codes, scales, tensor_scale), kept)
