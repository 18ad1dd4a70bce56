"""Who computes, what is refused, and that torch knows the shapes of what is computed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ext.errors import UserError
from megatron_ext.precision import gemm, quantize
from megatron_ext.precision.backend import able, choose
from megatron_ext.precision.block_format import FP8_1X128, MXFP4, NVFP4
from megatron_ext.precision.linear_recipe import BackendName, linear_recipes
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer

CPU = torch.device("cpu")
QUANTIZERS = sorted(
    {
        (recipe.name, operand): quantizer
        for recipe in linear_recipes().values()
        for operand, quantizer in recipe.operands().items()
        if quantizer is not None
    }.items()
)


def test_a_cpu_takes_its_own() -> None:
    assert choose("auto", "quantize", Quantizer(MXFP4), CPU) == "cpu"
    assert able("multiply", (NVFP4, NVFP4), CPU) == ["cpu", "reference"]


@pytest.mark.parametrize("name", ["triton", "cuda", "scaled_mm"])
def test_what_is_named_runs_or_is_refused(name: BackendName) -> None:
    with pytest.raises(
        UserError,
        match=rf"precision.backend={name} cannot multiply mxfp4 by mxfp4"
        r" here: .*; cpu, reference can",
    ):
        choose(name, "multiply", (MXFP4, MXFP4), CPU)


def test_cuda_does_not_store_on_a_cpu() -> None:
    with pytest.raises(UserError, match="cuda cannot store fp8_1x128 here: it is for NVIDIA GPUs"):
        choose("cuda", "quantize", Quantizer(FP8_1X128), CPU)


@pytest.mark.parametrize(("name", "quantizer"), QUANTIZERS, ids=lambda value: str(value)[:40])
def test_shapes_of_stored_matrices_are_known(name: str, quantizer: Quantizer) -> None:
    matrix = torch.randn(48, 256)
    signs = torch.ones(quantizer.hadamard_group) if quantizer.signs != "none" else None
    real = quantize.quantize(matrix, quantizer, signs=signs)
    with FakeTensorMode():
        known = quantize.quantize(
            torch.empty(48, 256),
            quantizer,
            signs=None if signs is None else torch.empty(signs.shape),
        )
    for one, other in zip(real.tensors(), known.tensors(), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def stored(rows: int) -> Quantized:
    return quantize.quantize(torch.randn(rows, 64), Quantizer(NVFP4))


def test_operators_are_what_torch_expects() -> None:
    left, right = stored(3), stored(5)
    parts = (*gemm._in_parts(left), *gemm._in_parts(right), torch.float32, "reference")
    torch.library.opcheck(torch.ops.megatron_ext.multiply.default, parts)
    fields = quantize._fields(Quantizer(NVFP4))
    torch.library.opcheck(
        torch.ops.megatron_ext.quantize.default,
        (torch.randn(3, 64), None, *fields, 0, "reference"),
    )


def test_a_product_is_added_in_place() -> None:
    left, right = stored(3), stored(5)
    before = torch.randn(3, 5)
    out = before.clone()
    assert gemm.multiply(left, right, out=out) is out
    exact = before.double() + left.values().double() @ right.values().double().t()
    # 64 products and sums in float32.
    sizes = before.double().abs() + left.values().double().abs() @ right.values().double().abs().t()
    assert bool(((out.double() - exact).abs() <= 66 * 2.0**-24 * sizes).all())


def test_contracted_dims_must_agree() -> None:
    with pytest.raises(ValueError, match=r"contracted dims differ: \(3, 64\) and \(5, 32\)"):
        gemm.multiply(stored(3), torch.randn(5, 32))
