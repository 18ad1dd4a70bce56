"""What an H100 would be launched with: the launchers' own arguments, compiled and not started.

Triton's interpreter takes arguments that its compiler refuses, and skips what a launcher does for a
GPU alone. Here Triton is told that its device is sm_90, and to stop before the launch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.triton_process import needs_triton

ROOT = Path(__file__).resolve().parents[3]


@needs_triton
@pytest.mark.parametrize("what", ["products", "copies"])
def test_launchers_compile_for_hopper(what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.megatron_ext.precision.test_hopper_launch", what],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert (
        done.stdout.split()
        == {"products": ["product", "experts"], "copies": ["both", "norm"]}[what]
    )


def _compiled() -> list[Any]:
    """Kernels, as launchers ask for them from now on."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        binary_ext = "cubin"

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return device

    driver.set_active(Hopper())
    kernels: list[Any] = []
    run: Any = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        assert all(type(number) is int for number in grid)
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **options))
        return kernels[-1]

    JITFunction.run = compile_only
    return kernels


def _products(kernels: list[Any]) -> None:
    import torch

    from megatron_ext.precision.block_format import FP8_1X128, FP8_128X128
    from megatron_ext.precision.gemm_triton import multiply_triton
    from megatron_ext.precision.grouped_gemm_triton import grouped_multiply_triton
    from megatron_ext.precision.grouped_quantized import joined
    from megatron_ext.precision.quantizer import Quantizer
    from megatron_ext.precision.reference import quantize

    rows, square = (
        quantize(torch.randn(256, 256), Quantizer(each)) for each in (FP8_1X128, FP8_128X128)
    )
    multiply_triton(rows, square, out_dtype=torch.bfloat16)
    print("product")
    experts = joined([rows, rows], "columns")
    starts = torch.tensor([0, 256, 512], dtype=torch.int32)
    grouped_multiply_triton(experts, experts, starts, alignment=128)
    print("experts")
    for kernel in kernels:
        ptx = kernel.asm["ptx"]
        assert "wgmma.mma_async" in ptx
        assert "e4m3.e4m3" in ptx
        # Operands come by the copy engine.
        assert "cp.async.bulk.tensor" in ptx


def _copies(kernels: list[Any]) -> None:
    import torch

    from megatron_ext.precision.block_format import FP8_1X128
    from megatron_ext.precision.copy_request import CopyRequest
    from megatron_ext.precision.quantize_fused_triton import quantize_rms_norm_triton
    from megatron_ext.precision.quantize_triton import quantize_both_triton
    from megatron_ext.precision.quantizer import Quantizer

    matrix, request = torch.randn(256, 256).bfloat16(), CopyRequest(Quantizer(FP8_1X128))
    quantize_both_triton(matrix, request, request)
    print("both")
    assert "cvt.rn.satfinite.e4m3x2" in kernels[-1].asm["ptx"]
    quantize_rms_norm_triton(matrix, matrix[0], request, request, eps=1e-5)
    print("norm")


if __name__ == "__main__":
    {"products": _products, "copies": _copies}[sys.argv[1]](_compiled())
