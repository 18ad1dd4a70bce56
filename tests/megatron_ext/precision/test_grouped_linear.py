"""Experts by grouped products of few bits: formulas in float64, bytes kept, empty experts."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.precision.experts import LowPrecisionExperts
from megatron_ext.precision.grouped_linear import grouped_linear
from megatron_ext.precision.hadamard import hadamard_matrix
from megatron_ext.precision.layer_precision import LayerPrecision
from megatron_ext.precision.linear_operands import LinearSeeds
from megatron_ext.precision.linear_recipe import LinearRecipe, linear_recipes, override
from megatron_ext.precision.luq import luq_recipe
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import derive_seed
from megatron_ext.precision.reference import quantize

RECIPES = {name: recipe for name, recipe in linear_recipes().items() if name != "bf16"}
RECIPES["luq"] = luq_recipe()
SEEDS = LinearSeeds(run=5, each_pass=6, rank=2)
COUNTS = (37, 0, 64, 1)
IN_SIZE, OUT_SIZE = 256, 128
# Float32 sums of at most 256 products, in another order than float64's.
TOLERANCE = 256**0.5 * 2.0**-23
_ROWS, _WEIGHT, _GRAD = range(3)


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Input, weights and gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    num_rows = sum(COUNTS)
    rows = torch.randn(num_rows, IN_SIZE, generator=generator)
    rows[:, 9] *= 20
    weight = torch.randn(len(COUNTS), OUT_SIZE, IN_SIZE, generator=generator) / 16
    return rows, weight, torch.randn(num_rows, OUT_SIZE, generator=generator)


def run(recipe: LinearRecipe, *, counts: tuple[int, ...] = COUNTS) -> tuple[Tensor, ...]:
    rows, weight, grad = matrices()
    rows, weight = rows.requires_grad_(), weight.requires_grad_()
    result = grouped_linear(rows, weight, recipe, SEEDS, counts)
    torch.autograd.backward(result, grad)
    assert rows.grad is not None
    assert weight.grad is not None
    return result.detach(), rows.grad, weight.grad


Stored = tuple[list[Tensor], list[Tensor | None]]


def stored(parts: list[Tensor], quantizer: Quantizer | None, product: int, matrix: int) -> Stored:
    """Values in float64 and masks of each expert's matrix.

    Where a scale is that of several rows each expert is stored alone, with numbers of its own;
    else all at once, so that random numbers count through: over rows, and in wgrad over tokens.
    """
    assert quantizer is not None
    seed, signs = SEEDS.rounding(product, matrix), SEEDS.signs(quantizer, product)
    if quantizer.block_format.block_rows == 1 and not quantizer.needs_tensor_amax:
        dim = 1 if product == 2 else 0
        found = quantize(torch.cat(parts, dim), quantizer, seed=seed, signs=signs)
        sizes = [part.shape[dim] for part in parts]
        mask = found.mask()
        masks: list[Tensor | None] = [None] * len(parts)
        if mask is not None:
            masks = [*torch.split(mask, sizes, dim)]
        return list(torch.split(found.values().double(), sizes, dim)), masks
    each = [
        quantize(part, quantizer, seed=derive_seed(seed, expert), signs=signs)
        if part.numel()
        else None
        for expert, part in enumerate(parts)
    ]
    values = [
        part.double() if one is None else one.values().double()
        for part, one in zip(parts, each, strict=True)
    ]
    return values, [None if one is None else one.mask() for one in each]


def by_formula(recipe: LinearRecipe) -> tuple[Tensor, ...]:
    rows, weight, grad = matrices()
    bounds = list(pairwise(accumulate(COUNTS, initial=0)))
    xs, dys = ([whole[a:b] for a, b in bounds] for whole in (rows, grad))
    ws = list(weight)
    left, mask_x = stored(xs, recipe.forward_input, 0, _ROWS)
    right, mask_w = stored(ws, recipe.forward_weight, 0, _WEIGHT)
    results = [one @ other.t() for one, other in zip(left, right, strict=True)]
    if recipe.backward_reads == "stored":
        xs, ws = [one.float() for one in left], [one.float() for one in right]
    of_grad, _ = stored(dys, recipe.dgrad_grad, 1, _GRAD)
    of_weight, _ = stored([one.t() for one in ws], recipe.dgrad_weight, 1, _WEIGHT)
    grad_rows = [one @ other.t() for one, other in zip(of_grad, of_weight, strict=True)]
    assert recipe.wgrad_grad is not None
    group = recipe.wgrad_grad.group

    def filled(parts: list[Tensor]) -> list[Tensor]:
        return [F.pad(one.t(), (0, -len(one) % group)) for one in parts]

    of_grad, _ = stored(filled(dys), recipe.wgrad_grad, 2, _GRAD)
    of_rows, _ = stored(filled(xs), recipe.wgrad_input, 2, _ROWS)
    grad_weight = [one @ other.t() for one, other in zip(of_grad, of_rows, strict=True)]
    if recipe.backward_reads == "stored":
        assert recipe.forward_input is not None
        size = recipe.forward_input.hadamard_group
        turn = torch.kron(torch.eye(IN_SIZE // size), hadamard_matrix(size)).double()
        grad_rows = turned_back(grad_rows, mask_x, turn)
        grad_weight = turned_back(grad_weight, mask_w, turn)
    return torch.cat(results), torch.cat(grad_rows), torch.stack(grad_weight)


def turned_back(grads: list[Tensor], masks: list[Tensor | None], turn: Tensor) -> list[Tensor]:
    return [
        (grad if mask is None else grad * mask) @ turn
        for grad, mask in zip(grads, masks, strict=True)
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_products_are_the_formulas(name: str) -> None:
    for found, expected in zip(run(RECIPES[name]), by_formula(RECIPES[name]), strict=True):
        assert float((found - expected).norm()) <= TOLERANCE * float(expected.norm())
    grad_weight = run(RECIPES[name])[2]
    assert not grad_weight[1].any()


@pytest.mark.parametrize("name", RECIPES)
def test_weights_gradients_are_added_to_megatrons_buffer_unrounded(name: str) -> None:
    _, _, expected = run(RECIPES[name])
    rows, weight, grad = matrices()
    weight.requires_grad_()
    weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    result = grouped_linear(rows, weight, RECIPES[name], SEEDS, COUNTS)
    torch.autograd.backward(result, grad)
    assert weight.grad_added_to_main_grad is True  # type: ignore[attr-defined]
    assert weight.grad is not None
    assert not weight.grad.any()
    added = weight.main_grad - 1  # type: ignore[attr-defined]
    # Added to 1: sums of magnitude up to 100 in float32.
    assert torch.allclose(added, expected, atol=256 * 2.0**-23, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "bytes_an_element"),
    [
        ("fp8_tensorwise", 1.0),
        ("fp8_blockwise", 1 + 4 / 128),
        ("mxfp8", 1 + 1 / 32),
        ("mxfp4", 0.5 + 1 / 32),
        ("nvfp4", 0.5 + 1 / 16),
        # A bit for the mask.
        ("quartet", 0.5 + 1 / 32 + 1 / 8),
        ("quartet2", 0.5 + 1 / 16),
    ],
)
def test_what_is_kept_is_of_few_bits(name: str, bytes_an_element: float) -> None:
    """Both linear maps of all experts: their inputs in few bits, and no copy of more."""
    counts = torch.tensor([128, 256])
    rows = torch.randn(384, 256).requires_grad_()
    fc1, fc2 = torch.randn(2, 512, 256).requires_grad_(), torch.randn(2, 256, 256).requires_grad_()
    layers = [LayerPrecision(RECIPES[name], 1, number, 0, None) for number in (0, 1)]
    sizes: dict[int, int] = {}
    parameters = {fc1.data_ptr(), fc2.data_ptr()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = LowPrecisionExperts(*layers)(rows, counts, fc1, fc2)
    assert result.shape == rows.shape
    num_inputs = rows.numel() + 384 * 256
    gate_up = 384 * 512 * 4
    if RECIPES[name].backward_reads == "stored":
        num_inputs += fc1.numel() + fc2.numel()
    # SwiGLU keeps its own input, in the run's dtype; each expert may have a float32 scale.
    assert sum(sizes.values()) - gate_up <= num_inputs * bytes_an_element + 4 * 2 * 4
    assert sum(sizes.values()) - gate_up >= num_inputs * 0.5


def test_an_operand_left_in_its_dtype_is_multiplied_expert_by_expert() -> None:
    recipe = override(RECIPES["mxfp8"], {"forward_input": {"block_format": None}})
    result, _, grad_weight = run(recipe)
    rows, weight, _ = matrices()
    assert recipe.forward_weight is not None
    whole = quantize(weight[2], recipe.forward_weight)
    expected = rows[37:101].double() @ whole.values().double().t()
    found = result[37:101]
    assert float((found - expected).norm()) <= TOLERANCE * float(expected.norm())
    assert not grad_weight[1].any()


def test_no_rows_at_all_are_part_of_the_graph() -> None:
    layers = [LayerPrecision(RECIPES["nvfp4"], 1, number, 0, None) for number in (0, 1)]
    fc1, fc2 = torch.ones(2, 64, 32).requires_grad_(), torch.ones(2, 32, 32).requires_grad_()
    rows = torch.zeros(0, 32, requires_grad=True)
    result = LowPrecisionExperts(*layers)(rows, torch.tensor([0, 0]), fc1, fc2)
    torch.autograd.backward(result.sum())
    assert result.shape == (0, 32)
    assert fc1.grad is not None
    assert not fc1.grad.any()
