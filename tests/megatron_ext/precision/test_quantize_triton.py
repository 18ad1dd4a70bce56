"""The Triton quantisers against the definition, bit for bit under the interpreter, and on a GPU."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from megatron_ext.precision.block_format import BLOCK_FORMATS
from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.linear_recipe import OPERANDS, linear_recipes
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.reference import quantize
from tests.triton_process import needs_triton, run_interpreted

# One, primes, more than a tile; columns are multiples of every group.
SIZES = ((1, 128), (131, 128), (7, 384))


def quantizers() -> dict[str, Quantizer]:
    """Every way in which a recipe stores, and every format by itself."""
    found: dict[Quantizer, str] = {}
    for name, recipe in linear_recipes().items():
        for operand in OPERANDS:
            quantizer = getattr(recipe, operand)
            if quantizer is not None:
                found.setdefault(quantizer, f"{name} {operand}")
    for name, block_format in BLOCK_FORMATS.items():
        found.setdefault(Quantizer(block_format), name)
        found.setdefault(Quantizer(block_format, "stochastic"), f"{name} stochastic")
    return {name: quantizer for quantizer, name in found.items()}


def matrix(rows: int, columns: int, device: str = "cpu") -> Tensor:
    """bf16 over many magnitudes, with what is hard: zeros, ties, subnormals, large ones."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    values = torch.randn(rows, columns, generator=generator)
    values *= torch.exp(3 * torch.randn(rows, 1, generator=generator))
    values[0, :16] = 0.0
    values[-1, 16:24] = torch.tensor([0.25, 0.75, 1.25, -1.75, 2.5, -3.5, 5.0, 6.0])
    values[0, 24:28] = torch.tensor([1e-40, -1e-39, 1e15, -1e15])
    return values.bfloat16().to(device)


def signs_of(quantizer: Quantizer, device: str = "cpu") -> Tensor | None:
    if quantizer.signs == "none" or quantizer.hadamard_group == 1:
        return None
    generator = torch.Generator().manual_seed(5)
    draws = torch.randint(0, 2, (quantizer.hadamard_group,), generator=generator)
    return (2.0 * draws - 1.0).to(device)


def check_equal(found: Quantized, expected: Quantized, what: str) -> None:
    for field in fields(expected):
        left, right = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(right, Tensor):
            assert left is not None, (what, field.name)
            assert left.shape == right.shape, (what, field.name)
            assert left.dtype == right.dtype, (what, field.name)
            same = left.cpu().reshape(-1).view(torch.uint8) == right.reshape(-1).view(torch.uint8)
            assert bool(same.all()), (what, field.name, int((~same).sum()))
        else:
            assert left == right, (what, field.name)


def check(device: str) -> int:
    """All quantizers and sizes, each copy alone and both together; how many."""
    from megatron_ext.precision.quantize_triton import quantize_both_triton, quantize_triton

    count = 0
    for name, quantizer in quantizers().items():
        for rows, columns in SIZES:
            x = matrix(rows, columns, device)
            signs = signs_of(quantizer, device)
            host_signs = None if signs is None else signs.cpu()
            expected = quantize(x.cpu(), quantizer, seed=11, signs=host_signs)
            found = quantize_triton(x, quantizer, seed=11, signs=signs)
            check_equal(found, expected, f"{name} {rows}x{columns}")
            count += 1
        # A view of the transpose is read as it lies.
        turned = x.t().contiguous().t()
        assert turned.stride(0) == 1
        found = quantize_triton(turned, quantizer, seed=11, signs=signs)
        check_equal(found, expected, f"{name}, turned")
    rows, columns = 128, 256
    x = matrix(rows, columns, device)
    for name, quantizer in quantizers().items():
        signs = signs_of(quantizer, device)
        host_signs = None if signs is None else signs.cpu()
        one, two = CopyRequest(quantizer, 3, signs), CopyRequest(quantizer, 4, signs)
        first, second = quantize_both_triton(x, one, two)
        check_equal(first, quantize(x.cpu(), quantizer, seed=3, signs=host_signs), f"{name} both")
        expected = quantize(x.cpu().t(), quantizer, seed=4, signs=host_signs)
        check_equal(second, expected, f"{name} both, transposed")
        count += 1
    check_refusals(x)
    return count + check_fused(device)


def check_refusals(x: Tensor) -> None:
    from megatron_ext.precision.quantize_triton import quantize_triton

    with pytest.raises(ValueError, match="40 is no multiple"):
        quantize_triton(x[:, :40], Quantizer(BLOCK_FORMATS["mxfp4"]))
    with pytest.raises(ValueError, match="no Triton kernel for Hadamard groups above 128"):
        quantize_triton(x, Quantizer(BLOCK_FORMATS["mxfp4"], hadamard_group=256))


def check_fused(device: str) -> int:
    """After RMSNorm and SwiGLU: the bits of storing what they give, rounded to bf16."""
    from megatron_ext.precision.quantize_fused_triton import (
        quantize_rms_norm_triton,
        quantize_swiglu_triton,
    )

    rows, columns = 131, 256
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(rows, columns, generator=generator).bfloat16().to(device)
    weight = torch.rand(columns, generator=generator).bfloat16().to(device)
    gate_up = torch.randn(rows, 2 * columns, generator=generator).bfloat16().to(device)
    count = 0
    for name in ("fp8_1x128", "mxfp8", "nvfp4"):
        # The transpose has 131 columns, which only one scale for the tensor divides.
        row = CopyRequest(Quantizer(BLOCK_FORMATS[name]), 1)
        other = CopyRequest(Quantizer(BLOCK_FORMATS["fp8_tensor"]), 2)
        first, second, rrms, kept = quantize_rms_norm_triton(
            x, weight, row, other, eps=1e-5, keeps_original=True
        )
        assert kept is not None
        x32 = x.float()
        expected = (x32.square().mean(dim=1) + 1e-5).rsqrt()
        # A sum of 256 squares in another order, a division and a root: within 16 roundings.
        torch.testing.assert_close(rrms, expected, rtol=16 * 2.0**-24, atol=0.0)
        normed = (x32 * rrms[:, None] * weight.float()).bfloat16()
        assert torch.equal(kept, normed)
        check_equal(first, quantize(normed.cpu(), row.quantizer, seed=1), f"{name} rms_norm")
        turned = quantize(normed.cpu().t(), other.quantizer, seed=2)
        check_equal(second, turned, f"{name} rms_norm, transposed")
        first, second, kept = quantize_swiglu_triton(gate_up, row, other, keeps_original=True)
        assert kept is not None
        gate, up = gate_up.float().chunk(2, dim=1)
        silu = torch.nn.functional.silu(gate).bfloat16().float()
        # exp may differ in its last bit, which moves a rounding to bf16 now and then.
        distance = (kept.float() - (silu * up).bfloat16().float()).abs()
        assert bool((distance <= kept.float().abs() * 2.0**-7).all())
        check_equal(first, quantize(kept.cpu(), row.quantizer, seed=1), f"{name} swiglu")
        check_equal(
            second, quantize(kept.cpu().t(), other.quantizer, seed=2), f"{name} swiglu, transposed"
        )
        count += 2
    return count


@needs_triton
def test_bits_are_those_of_the_definition() -> None:
    printed = run_interpreted(__file__)
    assert int(printed.split()[-1]) > 100


@pytest.mark.gpu
@needs_triton
def test_bits_on_a_gpu_are_those_of_the_definition() -> None:
    assert check("cuda") > 100


@needs_triton
def test_what_no_kernel_does_is_said() -> None:
    from megatron_ext.precision.quantize_triton import why_not_quantize

    cpu = torch.device("cpu")
    reasons = {name: why_not_quantize(each, cpu) for name, each in quantizers().items()}
    assert set(reasons.values()) == {""}
    large = Quantizer(BLOCK_FORMATS["mxfp4"], hadamard_group=256)
    assert why_not_quantize(large, cpu) == "Hadamard groups above 128"


if __name__ == "__main__":
    print(check("cpu"))
