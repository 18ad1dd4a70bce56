"""CUDA products, as far as a CPU can see them: scale layouts by their own kernels, run as fibers,
and against CUTLASS's layout function; which kernel is taken; what is refused and how."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.cuda_compiler import cuda_root, cutlass_includes, find_nvcc
from megatron_ext.precision.block_format import (
    BLOCK_FORMATS,
    FP8_1X128,
    FP8_128X128,
    MXFP4,
    MXFP8,
    NVFP4,
    NVFP4_2D,
    BlockFormat,
)
from megatron_ext.precision.gemm_cuda import grouped_multiply_cuda, multiply_cuda
from megatron_ext.precision.gemm_cuda_plan import (
    KERNELS,
    CudaProduct,
    check_sizes,
    family_of,
    kernel_of,
    takes_tall_tiles,
    why_not_on,
)
from megatron_ext.precision.grouped_quantized import GroupedQuantized, joined
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.reference import quantize
from megatron_ext.precision.scale_swizzle import swizzled_scales

CSRC = Path(__file__).resolve().parents[3] / "csrc"
SHAPES = [(1, 1), (128, 4), (131, 7), (300, 13), (257, 64)]


def _build(source: str, folder: Path, *flags: str) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = folder / "library.so"
    command = [compiler, "-std=c++17", "-shared", "-fPIC", *flags, str(CSRC / "gemm" / source)]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    flags = ["-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    library = _build("host.cpp", tmp_path_factory.mktemp("gemm"), *flags)
    library.swizzle.restype = library.by_column.restype = ctypes.c_char_p
    library.swizzled_bytes.restype = ctypes.c_int64
    return library


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _swizzled(kernels: ctypes.CDLL, scales: Tensor, rows: int, block_rows: int = 1) -> Tensor:
    sizes = ctypes.c_int64(rows), ctypes.c_int64(scales.shape[1])
    out = torch.full((kernels.swizzled_bytes(*sizes),), 0xA5, dtype=torch.uint8)
    assert kernels.swizzle(_pointer(scales), _pointer(out), *sizes, block_rows) is None
    return out


@pytest.mark.parametrize(("rows", "num_blocks"), SHAPES)
@pytest.mark.parametrize("block_rows", [1, 16])
def test_the_swizzle_kernel_is_the_torch_formula(
    kernels: ctypes.CDLL, rows: int, num_blocks: int, block_rows: int
) -> None:
    scales = torch.randint(1, 256, (-(-rows // block_rows), num_blocks), dtype=torch.uint8)
    whole = torch.repeat_interleave(scales, block_rows, dim=0)[:rows]
    found = _swizzled(kernels, scales, rows, block_rows)
    assert torch.equal(found, swizzled_scales(whole).flatten())


def test_scales_stand_where_cutlass_looks_for_them(kernels: ctypes.CDLL, tmp_path: Path) -> None:
    nvcc, cutlass = find_nvcc(), cutlass_includes()
    if nvcc is None or not cutlass:
        pytest.skip("needs CUDA's headers and those of pip install nvidia-cutlass")
    cuda = cuda_root(nvcc) / "include"
    folders = (*cutlass, cuda, cuda / "cccl")
    host = _build("host_cutlass.cpp", tmp_path, "-O0", *(f"-I{folder}" for folder in folders))
    host.cutlass_offsets.restype = ctypes.c_int64
    for rows, num_blocks in SHAPES:
        for block in (16, 32):
            offsets = torch.empty(rows, num_blocks, dtype=torch.int64)
            span = host.cutlass_offsets(rows, num_blocks, block, _pointer(offsets))
            scales = torch.randint(1, 256, (rows, num_blocks), dtype=torch.uint8)
            found = _swizzled(kernels, scales, rows)
            assert found.numel() == span
            assert torch.equal(found[offsets], scales)


@pytest.mark.parametrize(("rows", "num_blocks"), SHAPES)
def test_scales_by_column_are_the_transpose(
    kernels: ctypes.CDLL, rows: int, num_blocks: int
) -> None:
    scales = torch.randn(rows, num_blocks)
    stride = -(-rows // 4) * 4
    out = torch.full((num_blocks, stride), torch.nan)
    arguments = (_pointer(scales), _pointer(out), rows, num_blocks, stride, _pointer(None), 0)
    assert kernels.by_column(*arguments) is None
    assert torch.equal(out[:, :rows], scales.t())
    assert bool(out[:, rows:].isnan().all())


@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=9),
    st.integers(1, 40),
    st.integers(0, 5),
    st.integers(0, 5),
)
@settings(max_examples=30, deadline=None)
def test_each_experts_scales_are_by_column_on_their_own(
    kernels: ctypes.CDLL, counts: list[int], num_blocks: int, before: int, after: int
) -> None:
    ends = torch.tensor([0, *counts]).cumsum(0) + before
    starts = ends.to(torch.int32)
    rows = int(starts[-1]) + after
    if not rows:
        return
    scales = torch.randn(rows, num_blocks)
    out = torch.full((rows * num_blocks,), torch.nan)
    kernels.by_column(
        _pointer(scales), _pointer(out), rows, num_blocks, rows, _pointer(starts), len(counts)
    )
    for first, last in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        part = out[first * num_blocks : last * num_blocks].view(num_blocks, last - first)
        assert torch.equal(part, scales[first:last].t())
    # Rows of no expert are written nowhere.
    assert int(out.isnan().sum()) == (before + after) * num_blocks


def test_kernels_have_the_numbers_of_the_header() -> None:
    header = (CSRC / "gemm" / "operators.h").read_text(encoding="utf-8")
    numbers = re.findall(r"^  k(\w+) = (\d+),$", header, re.MULTILINE)
    assert [name.lower() for name, _ in numbers] == [name.replace("_", "") for name in KERNELS]
    assert [int(number) for _, number in numbers] == list(range(len(KERNELS)))


@pytest.mark.parametrize(
    ("left", "right", "capability", "kernel"),
    [
        (FP8_1X128, FP8_128X128, (9, 0), "fp8_tall"),
        (FP8_1X128, FP8_1X128, (9, 0), "fp8_rows"),
        (NVFP4, NVFP4_2D, (10, 0), "nvfp4_sm100"),
        (NVFP4, NVFP4, (12, 0), "nvfp4_sm120"),
        (MXFP4, MXFP4, (12, 0), "mxfp4_sm120"),
        (MXFP8, MXFP8, (10, 0), "mxfp8_sm100"),
    ],
)
def test_a_pair_of_formats_has_its_kernel(
    left: BlockFormat, right: BlockFormat, capability: tuple[int, int], kernel: str
) -> None:
    assert why_not_on(left, right, capability, is_grouped=False) == ""
    family = family_of(left, right)
    assert family is not None
    assert kernel_of(family, capability) == kernel
    product = CudaProduct(kernel, 5, 8, 128, left.block_rows or 1, right.block_rows or 1)
    assert product.numbers()[0] == KERNELS.index(kernel)
    assert product.numbers()[1:] == [5, 8, 128, left.block_rows, right.block_rows]


def test_a_device_has_kernels_for_what_it_multiplies_itself() -> None:
    devices = ((8, 0), (9, 0), (10, 0), (12, 0))
    for left in BLOCK_FORMATS.values():
        for right in BLOCK_FORMATS.values():
            reasons = [why_not_on(left, right, device, is_grouped=False) for device in devices]
            can = [device for device, reason in zip(devices, reasons, strict=True) if not reason]
            family = family_of(left, right)
            if family is None:
                assert all(left.name in reason and right.name in reason for reason in reasons)
            elif left.element.bits == 4 or left is MXFP8:
                assert can == [(10, 0), (12, 0)]
            else:
                assert can == [(9, 0)]
    assert "sm_80" in why_not_on(NVFP4, NVFP4, (8, 0), is_grouped=False)
    assert "experts" in why_not_on(NVFP4, NVFP4, (10, 0), is_grouped=True)
    assert why_not_on(FP8_1X128, FP8_1X128, (9, 0), is_grouped=True) == ""


def test_tall_tiles_are_for_products_that_fill_the_device() -> None:
    h100 = 132
    assert takes_tall_tiles(4096, 7168, h100)
    assert takes_tall_tiles(8192, 8192, h100)
    # 128 rows fill half of a tall tile.
    assert not takes_tall_tiles(128, 8192, h100)
    # One wave of small tiles, while tall ones leave half of the multiprocessors idle.
    assert not takes_tall_tiles(1024, 2048, h100)


def _stored(rows: int, columns: int, block_format: BlockFormat) -> Quantized:
    return quantize(torch.randn(rows, columns), Quantizer(block_format))


def test_sizes_that_no_kernel_takes_are_named() -> None:
    with pytest.raises(ValueError, match="contract over multiples of 16; this is 136"):
        check_sizes(FP8_1X128, 136, 8, 4)
    with pytest.raises(ValueError, match="contract over multiples of 32; this is 48"):
        check_sizes(NVFP4, 48, 8, 4)
    with pytest.raises(ValueError, match="multiples of 8 elements of 2 bytes; right has 12 rows"):
        check_sizes(FP8_1X128, 128, 12, 2)
    check_sizes(FP8_1X128, 144, 12, 4)


def test_products_that_no_kernel_makes_are_refused() -> None:
    left = _stored(4, 128, FP8_1X128)
    with pytest.raises(ValueError, match="no CUDA kernel multiplies fp8_1x128 by mxfp8"):
        multiply_cuda(left, _stored(4, 128, MXFP8))
    with pytest.raises(ValueError, match="left has 128 columns and right 256"):
        multiply_cuda(left, _stored(4, 256, FP8_128X128))
    with pytest.raises(ValueError, match="float16 was asked for"):
        multiply_cuda(left, _stored(8, 128, FP8_128X128), out_dtype=torch.float16)
    right = _stored(8, 128, FP8_128X128)
    with pytest.raises(ValueError, match=r"contiguous float32 \[4, 8\]; out is torch.bfloat16"):
        multiply_cuda(left, right, out=torch.zeros(4, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        multiply_cuda(left, right, out=torch.zeros(33)[1:].view(4, 8))


def test_without_the_extension_the_reason_is_given() -> None:
    if torch.cuda.is_available():
        pytest.skip("the extension may be there: this is about machines without a GPU")
    with pytest.raises(RuntimeError, match="CUDA extension"):
        multiply_cuda(_stored(4, 128, FP8_1X128), _stored(8, 128, FP8_128X128))


def test_nothing_to_multiply_needs_no_kernel() -> None:
    empty = _stored(0, 128, FP8_1X128)
    assert multiply_cuda(empty, _stored(8, 128, FP8_128X128)).shape == (0, 8)


def _columns(rows: int) -> GroupedQuantized:
    return joined([_stored(rows, 128, FP8_1X128) for _ in range(2)], "columns")


def test_experts_that_no_kernel_takes_are_refused() -> None:
    starts = torch.tensor([0, 128, 256])
    with pytest.raises(
        ValueError, match="multiples of 128, the block along them; alignment says 1"
    ):
        grouped_multiply_cuda(_columns(8), _columns(4), starts)
    mxfp8 = joined([_stored(8, 128, MXFP8) for _ in range(2)], "columns")
    with pytest.raises(ValueError, match="no CUDA kernel for experts in mxfp8"):
        grouped_multiply_cuda(mxfp8, mxfp8, starts)
    rows = joined([_stored(5, 128, FP8_1X128) for _ in range(2)], "rows")
    with pytest.raises(ValueError, match="no CUDA product of rows in fp8_1x128 with columns"):
        grouped_multiply_cuda(rows, _columns(4), starts)
    weights = joined([_stored(8, 256, FP8_128X128) for _ in range(2)], "stacked")
    with pytest.raises(ValueError, match="rows of 128 columns of 2 experts do not go"):
        grouped_multiply_cuda(rows, weights, torch.tensor([0, 5, 10]))
