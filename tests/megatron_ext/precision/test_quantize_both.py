"""A matrix and its transpose in one call have the bits of two; the linear layer asks so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.precision import reference
from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.linear import low_precision_linear
from megatron_ext.precision.linear_operands import LinearSeeds
from megatron_ext.precision.linear_recipe import linear_recipes
from megatron_ext.precision.quantize import quantize_both
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import random_signs

RECIPES = {name: recipe for name, recipe in linear_recipes().items() if name != "bf16"}


def request_of(quantizer: Quantizer, seed: int) -> CopyRequest:
    has_signs = quantizer.signs != "none"
    return CopyRequest(
        quantizer, seed, random_signs(seed, quantizer.hadamard_group) if has_signs else None
    )


def same_bits(found: Quantized, expected: Quantized) -> bool:
    return found.block_format == expected.block_format and all(
        (one is None and other is None)
        or (one is not None and other is not None and torch.equal(one, other))
        for one, other in zip(found.tensors(), expected.tensors(), strict=True)
    )


@pytest.mark.parametrize("num_tokens", [128, 50])
@pytest.mark.parametrize("side", ["input", "grad"])
@pytest.mark.parametrize("name", RECIPES)
def test_both_are_the_references(name: str, side: str, num_tokens: int) -> None:
    recipe = RECIPES[name]
    first = recipe.forward_input if side == "input" else recipe.dgrad_grad
    second = recipe.wgrad_input if side == "input" else recipe.wgrad_grad
    assert first is not None
    assert second is not None
    matrix = torch.randn(num_tokens, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    row, transposed = request_of(first, 4), request_of(second, 9)
    filled = num_tokens + -num_tokens % second.group
    agreed = matrix.float().abs().amax() * 2

    def reduce_amax(amax: Tensor) -> Tensor:
        return torch.maximum(amax, agreed)

    found = quantize_both(matrix, row, transposed, reduce_amax=reduce_amax, num_columns=filled)
    turned = F.pad(matrix.t(), (0, filled - num_tokens))
    for one, request, values in zip(found, (row, transposed), (matrix, turned), strict=True):
        expected = reference.quantize(
            values,
            request.quantizer,
            seed=request.seed,
            signs=request.signs,
            reduce_amax=reduce_amax,
        )
        assert same_bits(one, expected)


def test_a_layer_stores_input_and_gradient_in_one_call_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where backward reads the originals; Quartet's forward stores its input once."""
    import megatron_ext.precision.linear_operands

    linear_module: Any = megatron_ext.precision.linear_operands
    real = linear_module.quantize_both
    shapes: list[tuple[int, ...]] = []

    def counted(matrix: Tensor, *requests: Any, **options: Any) -> Any:
        shapes.append(tuple(matrix.shape))
        return real(matrix, *requests, **options)

    monkeypatch.setattr(linear_module, "quantize_both", counted)
    for name, expected in (("nvfp4", [(64, 256), (64, 128)]), ("quartet", [(64, 128)])):
        shapes.clear()
        rows = torch.randn(64, 256, requires_grad=True)
        weight = torch.randn(128, 256, requires_grad=True)
        result = low_precision_linear(rows, weight, RECIPES[name], LinearSeeds(1, 2))
        torch.autograd.backward(result.sum())
        assert shapes == expected
