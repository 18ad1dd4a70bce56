"""LUQ as its paper has it: seven powers of two without a bias, integers with two moments' clip."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.precision.backend import choose
from megatron_ext.precision.block_format import INT4_TENSOR, LOG4_TENSOR
from megatron_ext.precision.luq import luq_recipe
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.reference import quantize

RECIPE = luq_recipe()


def quantizer(operand: str) -> Quantizer:
    found: Quantizer | None = RECIPE.operands()[operand]
    assert found is not None
    return found


def test_gradients_are_powers_of_two_under_the_largest() -> None:
    """alpha = max / 2^6; below alpha there is only 0."""
    grad = torch.randn(128, 64) * torch.exp2(torch.randint(-6, 2, (128, 64)).float())
    values = quantize(grad, quantizer("dgrad_grad"), seed=1).values().abs()
    alpha = grad.abs().max() / 64
    levels = [0.0] + [2.0**power for power in range(7)]
    assert sorted({round(level, 6) for level in (values / alpha).flatten().tolist()}) == levels


def test_gradients_keep_their_mean_below_alpha_too() -> None:
    """The mean of n draws lies within 5 standard errors, each at most a step / 2 / sqrt(n)."""
    count = 1 << 16
    for value in (0.003, 0.011, 0.3, 0.77, 1.0):
        row = torch.full((1, count), value)
        row[0, 0] = 1.0
        found = quantize(row, quantizer("wgrad_grad"), seed=7).values()[0, 1:]
        step = max(2.0 ** math.floor(math.log2(value)), 2.0**-6)
        assert abs(float(found.double().mean()) - value) <= 5 * step / 2 / math.sqrt(count - 1)


def test_weights_and_inputs_are_clipped_where_a_normal_number_loses_least() -> None:
    """Integers -7 .. 7; SAWB's coefficients were fitted, so 5 % beside the best clip of a grid."""
    values = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    found = quantize(values, quantizer("forward_weight"))
    integers = found.values() / found.scales * 2
    assert torch.equal(torch.unique(integers.round()), torch.arange(-7.0, 8.0))

    def square_error(clip: float) -> float:
        step = clip / 7
        return float((((values / step).round().clamp(-7, 7) * step) - values).square().mean())

    best = min(square_error(clip / 20) for clip in range(30, 90))
    assert float((found.values() - values).square().mean()) < 1.05 * best


def test_a_tensor_of_one_magnitude_or_of_zeros_is_kept() -> None:
    """Its two moments say a negative clip."""
    for size in (0.0, 0.75):
        values = torch.full((8, 16), size)
        stored = quantize(values, quantizer("forward_input")).values()
        torch.testing.assert_close(stored, values, rtol=1e-6, atol=0.0)


def test_no_kernel_pretends_to_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("parallel.device.has_triton", lambda: True)
    with pytest.raises(UserError, match=r"LUQ is there to be compared with.*; cpu, reference can"):
        choose.__wrapped__("triton", "multiply", (LOG4_TENSOR, INT4_TENSOR), cpu)
    assert choose("auto", "quantize", quantizer("dgrad_grad"), cpu) == "cpu"
