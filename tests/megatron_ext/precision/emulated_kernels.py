"""The CUDA quantise kernels on the CPU: csrc/quantize/host.cpp, built by g++ and called by ctypes.

Every thread of a block is a fiber there, so kernels run whole: loads, shared memory, shuffles,
barriers, arithmetic, stores.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.precision.quantize_cuda import KernelCopy

CSRC = Path(__file__).resolve().parents[3] / "csrc"
NUM_RULE_NUMBERS = 12

_INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_Rule = ctypes.c_int * NUM_RULE_NUMBERS


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("input", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


class _Copy(ctypes.Structure):
    _fields_ = (
        ("rule", _Rule),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "tensor_scale", "kept")),
        ("signs", ctypes.c_void_p),
        ("amax", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
    )


class EmulatedKernels:
    """`Kernels` of quantize_cuda.py, by fibers."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.quantize_matrix.restype = ctypes.c_char_p
        self._library.largest_magnitudes.restype = ctypes.c_char_p

    def quantize(
        self, matrix: Tensor, row: KernelCopy | None, transposed: KernelCopy | None
    ) -> None:
        arguments = (_matrix(matrix), _copy(row), _copy(transposed))
        error = self._library.quantize_matrix(*(ctypes.byref(each) for each in arguments))
        assert error is None, error

    def largest_magnitudes(
        self, matrix: Tensor, rule: list[int], signs: Tensor | None, transposed: bool, amax: Tensor
    ) -> None:
        error = self._library.largest_magnitudes(
            ctypes.byref(_matrix(matrix)),
            ctypes.byref(_Rule(*rule)),
            _pointer(signs),
            int(transposed),
            _pointer(amax),
        )
        assert error is None, error

    def encode(self, values: Tensor, element: int, uniform: Tensor | None = None) -> Tensor:
        """Codes of float32 numbers, by the functions of common/small_float.h."""
        codes = torch.empty(values.shape, dtype=torch.uint8)
        count = ctypes.c_int64(values.numel())
        self._library.encode(_pointer(values), _pointer(uniform), element, count, _pointer(codes))
        return codes


def build_emulated_kernels(folder: Path) -> EmulatedKernels:
    """With g++, in about three seconds."""
    library = folder / "quantize_host.so"
    compiler = shutil.which("g++")
    assert compiler is not None
    # The compiler must not make a * b + c one rounding, and fibers leave their stack by longjmp.
    flags = "-std=c++17 -O2 -ffp-contract=off -U_FORTIFY_SOURCE -shared -fPIC -Wall -Wextra"
    flags += " -Wno-unknown-pragmas -Werror"
    source = CSRC / "quantize" / "host.cpp"
    command = [compiler, *flags.split(), str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return EmulatedKernels(library)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _matrix(matrix: Tensor) -> _Matrix:
    return _Matrix(matrix.data_ptr(), _INPUTS[matrix.dtype], *matrix.shape)


def _copy(copy: KernelCopy | None) -> _Copy:
    if copy is None:
        return _Copy()
    stored = copy.stored
    tensors = (*stored.tensors(), copy.signs, copy.amax)
    pointers: Any = (None if each is None else each.data_ptr() for each in tensors)
    return _Copy(_Rule(*copy.rule), *pointers, copy.seed)
