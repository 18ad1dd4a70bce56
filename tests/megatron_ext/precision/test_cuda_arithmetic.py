"""The CUDA quantise kernels, thread by thread on the CPU, against their definition, bit for bit."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.precision.block_format import (
    BLOCK_FORMATS,
    FP8_128X128,
    FP8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    NVFP4_2D,
)
from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.element_format import E2M1, E4M3, E5M2
from megatron_ext.precision.formats import encode
from megatron_ext.precision.linear_recipe import linear_recipes
from megatron_ext.precision.quantize_cuda import (
    KernelCopy,
    quantize_both_cuda,
    quantize_cuda,
    rule_numbers,
    why_not_quantize,
)
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import random_signs, uniform_numbers
from megatron_ext.precision.reference import quantize
from tests.megatron_ext.precision.emulated_kernels import (
    NUM_RULE_NUMBERS,
    EmulatedKernels,
    build_emulated_kernels,
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

_NAMED = {
    **{name: Quantizer(each) for name, each in BLOCK_FORMATS.items()},
    **{
        f"{recipe} {operand}": quantizer
        for recipe, made in linear_recipes().items()
        for operand, quantizer in made.operands().items()
        if quantizer is not None
    },
    "quest 128": Quantizer(MXFP4, scale_rule="quest", hadamard_group=128, keeps_mask=True),
    "headroom 64": Quantizer(
        MXFP4, rounding="stochastic", scale_rule="headroom", hadamard_group=64, signs="random"
    ),
    "eden 16": Quantizer(NVFP4, scale_rule="eden", hadamard_group=16, signs="random"),
    "four over six, square": Quantizer(NVFP4_2D, tries_four=True),
    "random, square": Quantizer(FP8_128X128, rounding="stochastic"),
    "power of two": Quantizer(FP8_128X128, power_of_two_scales=True),
    "mxfp8 mask": Quantizer(MXFP8, hadamard_group=32, keeps_mask=True),
    "small groups": Quantizer(FP8_ROW, hadamard_group=4),
}
# Most recipes have one quantizer for several operands.
_FIRST_NAMES = {quantizer: name for name, quantizer in reversed(_NAMED.items())}
QUANTIZERS = {name: quantizer for quantizer, name in reversed(_FIRST_NAMES.items())}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    return build_emulated_kernels(tmp_path_factory.mktemp("kernels"))


def numbers(rows: int, columns: int, seed: int = 0, exponents: int = 6) -> Tensor:
    """Of many sizes, so that every step of a format is met."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-exponents, exponents + 1, (rows, columns), generator=generator)
    return torch.randn(rows, columns, generator=generator) * torch.exp2(powers.float())


def signs_of(quantizer: Quantizer) -> Tensor | None:
    return None if quantizer.signs == "none" else random_signs(3, quantizer.hadamard_group)


def same_bits(found: Quantized | None, expected: Quantized, case: str) -> None:
    """But for the sign of what stands for NaN, which is not the same on two processors either."""
    assert found is not None
    for name, ours, theirs in zip(
        ("codes", "scales", "tensor_scale", "kept"),
        found.tensors(),
        expected.tensors(),
        strict=True,
    ):
        assert (ours is None) == (theirs is None), (case, name)
        if ours is None or theirs is None:
            continue
        assert ours.shape == theirs.shape, (case, name)
        if ours.is_floating_point():
            assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1)), (case, name)
        elif name == "codes":
            differ = ours != theirs
            if differ.any():
                values, wanted = found.values(), expected.values()
                assert torch.equal(values.isnan(), wanted.isnan()), (case, name)
                assert torch.equal(values.nan_to_num(-1), wanted.nan_to_num(-1)), (case, name)
                assert wanted.isnan().any(), (case, name, int(differ.sum()))
        else:
            assert torch.equal(ours, theirs), (case, name)


def compare(
    kernels: EmulatedKernels, matrix: Tensor, quantizer: Quantizer, case: str, seed: int = 5
) -> None:
    """Both copies in one pass, and the row copy alone."""
    signs = signs_of(quantizer)
    is_square = (quantizer.block_format.block_rows or 1) > 1
    row = CopyRequest(quantizer, seed, signs)
    can_transpose = matrix.shape[0] % quantizer.group == 0 or not (
        quantizer.block_format.is_packed or quantizer.hadamard_group > 1
    )
    can_transpose &= not (is_square and quantizer.rounding == "stochastic")
    can_transpose &= not quantizer.keeps_mask or matrix.shape[0] % 8 == 0
    transposed = CopyRequest(quantizer, seed + 1, signs) if can_transpose else None
    found, of_transpose = quantize_both_cuda(matrix, row, transposed, kernels=kernels)
    expected = quantize(matrix, quantizer, seed=seed, signs=signs)
    same_bits(found, expected, case)
    if transposed is not None:
        wanted = quantize(matrix.t(), quantizer, seed=seed + 1, signs=signs)
        same_bits(
            of_transpose, expected.transposed() if is_square else wanted, f"{case} transposed"
        )
    alone, _ = quantize_both_cuda(matrix, row, None, kernels=kernels)
    same_bits(alone, expected, f"{case} alone")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_kernels_are_the_reference(kernels: EmulatedKernels, name: str) -> None:
    """Tiles of 128 x 128: exactly one, several, and such as are cut off on both sides."""
    quantizer = QUANTIZERS[name]
    for shape in ((128, 128), (256, 384), (144, 128), (1, 256)):
        for dtype in DTYPES:
            matrix = numbers(*shape).to(dtype)
            compare(kernels, matrix, quantizer, f"{name} {shape} {dtype}")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    name=st.sampled_from([n for n, f in BLOCK_FORMATS.items() if not f.is_packed]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_in_eight_bits(
    kernels: EmulatedKernels, rows: int, columns: int, name: str, dtype: torch.dtype
) -> None:
    """Rows that begin anywhere are read and written number by number."""
    quantizer = Quantizer(BLOCK_FORMATS[name])
    compare(kernels, numbers(rows, columns).to(dtype), quantizer, f"{name} {rows} {columns}")


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 10),
    columns=st.integers(1, 20),
    name=st.sampled_from([n for n, q in QUANTIZERS.items() if q.block_format.is_packed]),
)
def test_any_shape_in_four_bits(
    kernels: EmulatedKernels, rows: int, columns: int, name: str
) -> None:
    quantizer = QUANTIZERS[name]
    matrix = numbers(rows * 16, columns * quantizer.group).bfloat16()
    compare(kernels, matrix, quantizer, f"{name} {tuple(matrix.shape)}")


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-120, 2.0**120])
def test_tiny_huge_and_empty_blocks(kernels: EmulatedKernels, name: str, scale: float) -> None:
    """Subnormal scales, sums that overflow, blocks of zeros, and both zeros."""
    matrix = numbers(128, 256) * scale
    matrix[:16] = 0.0
    matrix[16:32] = -0.0
    matrix[64:80, 128:] = 0.0
    compare(kernels, matrix, QUANTIZERS[name], f"{name} {scale}")


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities(kernels: EmulatedKernels, name: str, poison: float) -> None:
    matrix = numbers(128, 256)
    matrix[40, 100] = poison
    matrix[41, 130] = -poison
    compare(kernels, matrix, QUANTIZERS[name], f"{name} {poison}")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_casts_are_the_reference(kernels: EmulatedKernels, number: int) -> None:
    """All 2^16 bfloat16 numbers, their neighbours in float32, and rounding at random."""
    every = torch.arange(1 << 16, dtype=torch.int32) << 16
    values = torch.cat([every, every + 1, every - 1]).view(torch.float32)
    chosen = (E4M3, E5M2, E2M1)[number]
    assert torch.equal(kernels.encode(values, number), encode(values, chosen))
    uniform = uniform_numbers(11, tuple(values.shape))
    found = kernels.encode(values, number, uniform)
    assert torch.equal(found, encode(values, chosen, uniform))


def test_copies_of_two_kinds_and_an_agreed_amax(kernels: EmulatedKernels) -> None:
    """Other elements or blocks for the transpose; ranks that agree on the largest magnitude."""
    matrix = numbers(128, 256).bfloat16()
    both = (
        CopyRequest(Quantizer(BLOCK_FORMATS["fp8_1x128"])),
        CopyRequest(Quantizer(BLOCK_FORMATS["nvfp4"], rounding="stochastic"), seed=9),
    )

    def tripled(amax: Tensor) -> Tensor:
        assert amax.shape == ()
        return amax * 3

    row, transposed = quantize_both_cuda(matrix, *both, reduce_amax=tripled, kernels=kernels)
    same_bits(row, quantize(matrix, both[0].quantizer, reduce_amax=tripled), "row")
    expected = quantize(matrix.t(), both[1].quantizer, seed=9, reduce_amax=tripled)
    same_bits(transposed, expected, "transposed")
    for name in ("fp8_tensor", "nvfp4"):
        quantizer = QUANTIZERS[name]
        expected = quantize(matrix, quantizer, reduce_amax=tripled)
        found, _ = quantize_both_cuda(
            matrix, CopyRequest(quantizer), None, reduce_amax=tripled, kernels=kernels
        )
        same_bits(found, expected, name)
        assert not torch.equal(expected.codes, quantize(matrix, quantizer).codes) or name == "nvfp4"


def test_positions_count_across_tiles(kernels: EmulatedKernels) -> None:
    """Random numbers go by the place in the whole matrix, so tiles do not repeat them."""
    matrix = torch.full((256, 256), 0.3)
    quantizer = Quantizer(MXFP4, rounding="stochastic", scale_rule="headroom")
    found, _ = quantize_both_cuda(matrix, CopyRequest(quantizer, 2), None, kernels=kernels)
    assert found is not None
    assert not torch.equal(found.codes[:128, :64], found.codes[128:, 64:])
    same_bits(found, quantize(matrix, quantizer, seed=2), "tiles")


def test_nothing_is_written_outside(kernels: EmulatedKernels) -> None:
    """Codes and scales lie between bytes that must stay."""
    matrix = numbers(50, 77)
    for name in ("fp8_1x128", "mxfp8", "fp8_row", "fp8_128x128"):
        request = CopyRequest(QUANTIZERS[name])
        row, _ = quantize_both_cuda(matrix, request, request, kernels=GuardedKernels(kernels))
        same_bits(row, quantize(matrix, request.quantizer), name)


class GuardedKernels:
    """Gives kernels codes and scales with bytes around them, which must be as they were."""

    def __init__(self, kernels: EmulatedKernels) -> None:
        self._kernels = kernels
        self.largest_magnitudes = kernels.largest_magnitudes

    def quantize(
        self, matrix: Tensor, row: KernelCopy | None, transposed: KernelCopy | None
    ) -> None:
        guards: list[Tensor] = []
        copies = [self._guarded(row, guards), self._guarded(transposed, guards)]
        self._kernels.quantize(matrix, *copies)
        for copy, guarded in zip((row, transposed), copies, strict=True):
            assert copy is not None
            assert guarded is not None
            copy.stored.codes.copy_(guarded.stored.codes)
            copy.stored.scales.copy_(guarded.stored.scales)
        assert len(guards) == 8
        assert all((guard == 0xEE).all() for guard in guards)

    def _guarded(self, copy: KernelCopy | None, guards: list[Tensor]) -> KernelCopy:
        assert copy is not None
        inner = []
        for tensor in (copy.stored.codes, copy.stored.scales):
            whole = torch.full((tensor.nbytes + 256,), 0xEE, dtype=torch.uint8)
            inner.append(whole[128:-128].view(tensor.dtype).view(tensor.shape))
            guards += [whole[:128], whole[-128:]]
        return replace(copy, stored=replace(copy.stored, codes=inner[0], scales=inner[1]))


def test_what_no_kernel_does_is_said() -> None:
    device = torch.device("cuda")
    for name, quantizer in QUANTIZERS.items():
        assert "CUDA extension" in why_not_quantize(quantizer, device), name
        assert len(rule_numbers(quantizer)) == NUM_RULE_NUMBERS
    with pytest.raises(ValueError, match="square blocks with a Hadamard"):
        quantize_cuda(numbers(16, 32), Quantizer(NVFP4_2D, hadamard_group=16))
    with pytest.raises(ValueError, match="groups above 128"):
        quantize_cuda(numbers(16, 512), Quantizer(MXFP8, hadamard_group=256))
    with pytest.raises(ValueError, match=r"blocks of 16 .* 40"):
        quantize_cuda(numbers(4, 40), Quantizer(NVFP4))
    with pytest.raises(RuntimeError, match="MEGATRON_EXT_BUILD_CUDA=1"):
        quantize_cuda(numbers(4, 32), Quantizer(MXFP8))
