"""Linear layers of few bits: their three products against the recipes' formulas in float64."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.precision.block_format import MXFP4, NVFP4
from megatron_ext.precision.hadamard import hadamard_matrix
from megatron_ext.precision.linear import low_precision_linear
from megatron_ext.precision.linear_operands import LinearSeeds, Shares
from megatron_ext.precision.linear_recipe import (
    OPERANDS,
    LinearRecipe,
    linear_recipes,
    override,
)
from megatron_ext.precision.luq import luq_recipe
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.reference import quantize

SEEDS = LinearSeeds(run=5, each_pass=6, rank=0)
RECIPES = linear_recipes() | {"luq": luq_recipe()}
# Float32 sums of at most 256 terms, in another order than float64's.
TOLERANCE = 256**0.5 * 2.0**-23


def operands(num_tokens: int = 96, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Input with an outlier feature, weight, gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tokens, 256, generator=generator)
    rows[:, 9] *= 20
    weight = torch.randn(128, 256, generator=generator) / 16
    return rows, weight, torch.randn(num_tokens, 128, generator=generator)


def run(
    rows: Tensor, weight: Tensor, grad: Tensor, recipe: LinearRecipe, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows, weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    result = low_precision_linear(rows, weight, recipe, SEEDS, **options)
    torch.autograd.backward(result, grad)
    assert rows.grad is not None
    assert weight.grad is not None
    return result.detach(), rows.grad, weight.grad


def stored(matrix: Tensor, quantizer: Quantizer | None, product: int, operand: int) -> Any:
    """As the layer stores it: (values in float64, mask)."""
    if quantizer is None:
        return matrix.double(), None
    found = quantize(
        matrix,
        quantizer,
        seed=SEEDS.rounding(product, operand),
        signs=SEEDS.signs(quantizer, product),
    )
    return found.values().double(), found.mask()


def by_formula(
    rows: Tensor, weight: Tensor, grad: Tensor, recipe: LinearRecipe
) -> tuple[Tensor, Tensor, Tensor]:
    """The three products with dense matrices in float64, as the papers write them."""
    left, mask_rows = stored(rows, recipe.forward_input, 0, 0)
    right, mask_weight = stored(weight, recipe.forward_weight, 0, 1)
    result = left @ right.t()
    used_rows, used_weight = rows, weight
    if recipe.backward_reads == "stored":
        used_rows, used_weight = left.float(), right.float()
    missing = -len(rows) % (recipe.wgrad_grad.group if recipe.wgrad_grad else 1)
    grad_rows = (
        stored(grad, recipe.dgrad_grad, 1, 2)[0]
        @ stored(used_weight.t(), recipe.dgrad_weight, 1, 1)[0].t()
    )
    grad_weight = (
        stored(F.pad(grad.t(), (0, missing)), recipe.wgrad_grad, 2, 2)[0]
        @ stored(F.pad(used_rows.t(), (0, missing)), recipe.wgrad_input, 2, 0)[0].t()
    )
    if recipe.backward_reads == "stored":
        group = recipe.forward_input.hadamard_group if recipe.forward_input else 1
        turn = torch.kron(torch.eye(256 // group), hadamard_matrix(group)).double()
        grad_rows = (grad_rows if mask_rows is None else grad_rows * mask_rows) @ turn
        grad_weight = (grad_weight if mask_weight is None else grad_weight * mask_weight) @ turn
    return result, grad_rows, grad_weight


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= TOLERANCE * float(expected.norm())


@pytest.mark.parametrize("num_tokens", [96, 37, 1])
@pytest.mark.parametrize("name", RECIPES)
def test_products_are_the_formulas(name: str, num_tokens: int) -> None:
    rows, weight, grad = operands(num_tokens)
    found = run(rows, weight, grad, RECIPES[name])
    for one, expected in zip(found, by_formula(rows, weight, grad, RECIPES[name]), strict=True):
        assert close(one, expected)


def test_errors_have_the_papers_order() -> None:
    """FP8 is finer than NVFP4, and that than MXFP4; a Hadamard spreads the outlier."""
    rows, weight, grad = operands(256)
    exact = run(rows, weight, grad, RECIPES["bf16"])
    errors = {
        name: [
            float((one - right).norm() / right.norm())
            for one, right in zip(run(rows, weight, grad, recipe), exact, strict=True)
        ]
        for name, recipe in RECIPES.items()
    }
    assert errors["bf16"] == [0.0, 0.0, 0.0]
    for fine in ("fp8_tensorwise", "fp8_blockwise", "mxfp8"):
        assert max(errors[fine]) < 0.08
    for product in range(3):
        assert errors["nvfp4"][product] < errors["mxfp4_stochastic"][product]
    assert errors["quartet"][0] < errors["mxfp4"][0]


def test_random_signs_cancel_and_rounding_is_reproducible() -> None:
    rows, weight, grad = operands()
    recipe = RECIPES["quartet"]
    first = run(rows, weight, grad, recipe)
    again = run(rows, weight, grad, recipe)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    rows, weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    other = LinearSeeds(run=5, each_pass=7)
    torch.autograd.backward(low_precision_linear(rows, weight, recipe, other), grad)
    assert rows.grad is not None
    assert not torch.equal(rows.grad, first[1])
    assert float((rows.grad - first[1]).norm() / first[1].norm()) < 0.4


def test_what_is_kept_is_of_few_bits() -> None:
    rows, weight, _ = operands(256)
    for name, limit in (("fp8_blockwise", 1.05), ("nvfp4", 0.6), ("quartet", 0.67)):
        kept: list[Tensor] = []

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        leaf = rows.clone().requires_grad_()
        parameter = weight.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            low_precision_linear(leaf, parameter, RECIPES[name], SEEDS)
        num_bytes = sum(
            tensor.numel() * tensor.element_size()
            for tensor in kept
            if tensor.data_ptr() != parameter.data_ptr()
        )
        assert num_bytes <= limit * (rows.numel() + (weight.numel() if name == "quartet" else 0))


def test_the_weights_gradient_goes_to_megatrons_buffer_unrounded() -> None:
    rows, weight, grad = operands()
    expected = run(rows, weight, grad, RECIPES["mxfp8"])[2]
    rounded = weight.bfloat16()
    parameter = rounded.clone().requires_grad_()
    parameter.main_grad = torch.ones(128, 256)  # type: ignore[attr-defined]
    parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    result = low_precision_linear(rows, parameter, RECIPES["mxfp8"], SEEDS)
    torch.autograd.backward(result, grad)
    assert parameter.grad_added_to_main_grad is True  # type: ignore[attr-defined]
    assert parameter.grad is not None
    assert not parameter.grad.any()
    assert torch.allclose(parameter.main_grad - 1, expected, atol=1e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["fp8_tensorwise", "mxfp8", "mxfp4", "quartet", "nvfp4"])
@pytest.mark.parametrize("split", ["out", "in"])
def test_two_shares_store_what_the_whole_stores(name: str, split: Any) -> None:
    """With the other's amax, each half of a weight has the codes that it has in the whole."""
    _, weight, _ = operands()
    quantizer = RECIPES[name].forward_weight
    assert quantizer is not None
    whole = quantize(weight, quantizer).values()
    dim = 0 if split == "out" else 1
    halves = weight.chunk(2, dim)
    largest = quantize_amax(weight, quantizer)
    shares = Shares(split, lambda _: largest)
    found = [quantize(half, quantizer, reduce_amax=shares.of("weight")).values() for half in halves]
    assert torch.equal(torch.cat(found, dim), whole)


def quantize_amax(weight: Tensor, quantizer: Quantizer) -> Tensor:
    from megatron_ext.precision.reference import transformed

    return transformed(weight, quantizer, None).abs().amax()


def test_single_operands_can_be_changed() -> None:
    recipe = override(
        RECIPES["nvfp4"],
        {
            "dgrad_grad": {"rounding": "nearest"},
            "wgrad_input": {"block_format": None},
            "forward_input": {"block_format": "mxfp4", "hadamard_group": 32},
        },
    )
    assert recipe.dgrad_grad == replace(RECIPES["nvfp4"].dgrad_grad, rounding="nearest")  # type: ignore[type-var]
    assert recipe.wgrad_input is None
    assert recipe.forward_input == Quantizer(MXFP4, hadamard_group=32)
    assert recipe.wgrad_grad is not None
    assert recipe.wgrad_grad.block_format == NVFP4
    mistakes: list[tuple[dict[str, dict[str, Any]], str]] = [
        ({"forward": {}}, "no operand 'forward'"),
        ({"forward_input": {"format": "mxfp4"}}, "no 'format'"),
        ({"forward_input": {"block_format": "fp3"}}, "no block format 'fp3'"),
    ]
    for wrong, message in mistakes:
        with pytest.raises(ValueError, match=message):
            override(RECIPES["nvfp4"], wrong)
    with pytest.raises(ValueError, match="not quantized"):
        override(RECIPES["bf16"], {"forward_input": {"rounding": "stochastic"}})
    assert set(RECIPES["quartet"].operands()) == set(OPERANDS)


def test_recipes_are_data_without_torch() -> None:
    code = (
        "import sys; import megatron_ext.precision.linear_recipe as r; r.linear_recipes(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nan_reaches_the_loss() -> None:
    rows, weight, grad = operands()
    rows[3, 3] = float("nan")
    for name, recipe in RECIPES.items():
        result, _, grad_weight = run(rows, weight, grad, recipe)
        assert result[3].isnan().any(), name
        assert grad_weight.isnan().any(), name


def test_kept_is_what_wgrad_multiplies() -> None:
    """One copy of the input, and not a second one where backward reads what forward stored."""
    rows, weight, _ = operands()
    leaf = rows.clone().requires_grad_()
    result = low_precision_linear(leaf, weight.requires_grad_(), RECIPES["mxfp8"], SEEDS)
    codes = [tensor for tensor in result.grad_fn.saved_tensors if tensor is not None]  # type: ignore[union-attr]
    assert [tuple(tensor.shape) for tensor in codes] == [(128, 256), (256, 96), (256, 3)]
    assert isinstance(quantize(rows, Quantizer(MXFP4)), Quantized)
