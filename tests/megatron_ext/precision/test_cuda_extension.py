"""The door to the CUDA extension: why it is shut, in words that help."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ext import cuda_compiler
from megatron_ext.precision import cuda_extension
from megatron_ext.precision.cuda_extension import cuda_ops, why_no_cuda_extension


def test_not_built_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_extension, "cuda_library", lambda: None)
    reason = why_no_cuda_extension()
    assert reason is not None
    assert "MEGATRON_EXT_BUILD_CUDA=1 pip install" in reason
    with pytest.raises(RuntimeError, match="not built"):
        cuda_ops()


def test_another_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "this is a cpu device" in str(why_no_cuda_extension(torch.device("cpu")))
    library = tmp_path / "_cuda_kernels.so"
    library.touch()
    monkeypatch.setattr(cuda_extension, "cuda_library", lambda: library)
    if torch.version.cuda is None:
        assert "needs a CUDA build of torch" in str(why_no_cuda_extension())


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "_cuda_kernels.cpython-311.so"
    library.write_bytes(b"not a library")
    assert cuda_compiler.cuda_library(tmp_path) == library
    monkeypatch.setattr(cuda_extension, "cuda_library", lambda: library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "does not load" in str(why_no_cuda_extension())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_a_gpu_are_the_reference() -> None:
    """The same work as test_cuda_arithmetic.py has by fibers, here by the hardware's casts."""
    if reason := why_no_cuda_extension():
        pytest.skip(reason)
    from megatron_ext.precision.copy_request import CopyRequest
    from megatron_ext.precision.linear_recipe import linear_recipes
    from megatron_ext.precision.quantize_cuda import quantize_both_cuda
    from megatron_ext.precision.random_bits import random_signs
    from megatron_ext.precision.reference import quantize

    generator = torch.Generator("cuda").manual_seed(0)
    matrix = torch.randn(384, 512, device="cuda", generator=generator).bfloat16()
    for recipe in linear_recipes().values():
        for quantizer in recipe.operands().values():
            if quantizer is None:
                continue
            signs = None
            if quantizer.signs != "none":
                signs = random_signs(3, quantizer.hadamard_group, matrix.device)
            request = CopyRequest(quantizer, 5, signs)
            row, transposed = quantize_both_cuda(matrix, request, request)
            for found, of in ((row, matrix), (transposed, matrix.t())):
                expected = quantize(of, quantizer, seed=5, signs=signs)
                assert found is not None
                assert torch.equal(found.codes, expected.codes), quantizer
                assert torch.equal(found.scales, expected.scales), quantizer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_tensor_e5m2"])
def test_casts_of_the_hardware_are_the_reference(name: str) -> None:
    """All 2^16 bfloat16 numbers, with a scale of 1."""
    if reason := why_no_cuda_extension():
        pytest.skip(reason)
    from megatron_ext.precision.block_format import BLOCK_FORMATS
    from megatron_ext.precision.formats import encode
    from megatron_ext.precision.quantize_cuda import quantize_cuda
    from megatron_ext.precision.quantizer import Quantizer

    every = torch.arange(1 << 16, dtype=torch.int32, device="cuda").to(torch.int16)
    matrix = every.view(torch.bfloat16).view(256, 256)
    block_format = BLOCK_FORMATS[name]
    largest = torch.tensor(block_format.element.max_value, device="cuda")
    found = quantize_cuda(matrix, Quantizer(block_format), reduce_amax=lambda _: largest)
    assert float(found.scales) == 1.0
    expected = encode(matrix.float(), block_format.element)
    # NaN has no sign behind a product.
    numbers = ~matrix.isnan()
    assert torch.equal(found.codes[numbers], expected[numbers])
    assert set((found.codes[~numbers] & 0x7F).tolist()) == {block_format.element.nan_code}
