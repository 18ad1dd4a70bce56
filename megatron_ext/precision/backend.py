"""Who computes: for each operation and format, which backend can on this device, and which does.

| backend | stores | multiplies | where |
|---|---|---|---|
| `reference` | all | all | anywhere: the definition, in float32 torch |
| `cpu` | all | all | CPU: the same bits, faster |
| `triton` | all but LUQ | all | CUDA and ROCm; a CPU under the interpreter |
| `cuda` | as it was built | as it was built | CUDA, where the extension was compiled |
| `scaled_mm` | - | what `torch._scaled_mm` takes | CUDA |

`auto` takes the first of a fixed order that can. What is asked for by name is what runs, or a
UserError says why not and what would. `scaled_mm` only multiplies; operands are stored by what
`auto` takes. A product with an operand in the run's dtype is no product of few bits and is
done in float32 by `reference` whatever was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch

from megatron_ext.errors import UserError
from megatron_ext.precision.block_format import BLOCK_FORMATS, BlockFormat
from megatron_ext.precision.linear_recipe import BackendName
from megatron_ext.precision.quantizer import Quantizer
from parallel.device import DeviceInfo, device_info

Operation = Literal["quantize", "quantize_both", "multiply", "grouped_multiply"]
Subject = Quantizer | tuple[BlockFormat, BlockFormat]
"""What is asked about: how an operand is stored, or the formats of a product's operands."""

# In the order `auto` tries them: own kernels first, the definition last.
_ORDER: dict[str, tuple[BackendName, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "scaled_mm", "reference"),
    "rocm": ("triton", "reference"),
}
# Module and function; a module has `why_not_OPERATION(subject, device) -> str`, empty if it can.
_IMPLEMENTATIONS: dict[tuple[BackendName, Operation], tuple[str, str]] = {
    ("reference", "quantize"): ("reference", "quantize"),
    ("reference", "multiply"): ("gemm_reference", "multiply_reference"),
    ("reference", "grouped_multiply"): ("gemm_reference", "grouped_multiply_reference"),
    ("cpu", "quantize"): ("quantize_cpu", "quantize_cpu"),
    ("cpu", "multiply"): ("gemm_cpu", "multiply_cpu"),
    ("cpu", "grouped_multiply"): ("gemm_cpu", "grouped_multiply_cpu"),
    ("triton", "quantize"): ("quantize_triton", "quantize_triton"),
    ("triton", "quantize_both"): ("quantize_triton", "quantize_both_triton"),
    ("triton", "multiply"): ("gemm_triton", "multiply_triton"),
    ("triton", "grouped_multiply"): ("grouped_gemm_triton", "grouped_multiply_triton"),
    ("cuda", "quantize"): ("quantize_cuda", "quantize_cuda"),
    ("cuda", "quantize_both"): ("quantize_cuda", "quantize_both_cuda"),
    ("cuda", "multiply"): ("gemm_cuda", "multiply_cuda"),
    ("cuda", "grouped_multiply"): ("gemm_cuda", "grouped_multiply_cuda"),
    ("scaled_mm", "multiply"): ("gemm_scaled_mm", "multiply_scaled_mm"),
}


@cache
def choose(
    backend: BackendName, operation: Operation, subject: Subject, device: torch.device
) -> BackendName:
    """The backend that runs. UserError where the one asked for by name cannot."""
    if (backend, operation) == ("scaled_mm", "quantize"):
        backend = "auto"
    if backend != "auto":
        if reason := why_not(backend, operation, subject, device):
            others = ", ".join(able(operation, subject, device))
            raise UserError(
                f"precision.backend={backend} cannot {_in_words(operation, subject)} here: "
                f"{reason}; {others} can"
            )
        return backend
    return able(operation, subject, device)[0]


def able(operation: Operation, subject: Subject, device: torch.device) -> list[BackendName]:
    """Backends that can, in the order in which `auto` takes them."""
    order = _ORDER[_info(device).kind]
    return [name for name in order if not why_not(name, operation, subject, device)]


def why_not(
    backend: BackendName, operation: Operation, subject: Subject, device: torch.device
) -> str:
    """Why a backend cannot run an operation on a device; empty where it can."""
    if (backend, operation) not in _IMPLEMENTATIONS:
        return f"it has no way to {operation.replace('_', ' ')}"
    if reason := _why_not_here(backend, device):
        return reason
    if backend not in ("reference", "cpu") and _is_to_compare_with(subject):
        return "LUQ is there to be compared with, in torch alone"
    module_name, _ = _IMPLEMENTATIONS[backend, operation]
    try:
        module = _module(module_name)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    ask = getattr(module, f"why_not_{operation}", None)
    return "" if ask is None else ask(subject, device)


def makes_both(backend: BackendName, row: Quantizer, transposed: Quantizer) -> bool:
    """Whether a backend that can store either copy makes both in one pass over the matrix."""
    if (backend, "quantize_both") not in _IMPLEMENTATIONS:
        return False
    module_name, _ = _IMPLEMENTATIONS[backend, "quantize_both"]
    ask = getattr(_module(module_name), "why_not_transposed", None)
    is_one_pass = row.block_format.element == transposed.block_format.element
    return is_one_pass and (ask is None or not ask(transposed))


def implementation(backend: BackendName, operation: Operation) -> Callable[..., Any]:
    """The function of a chosen backend."""
    module_name, function = _IMPLEMENTATIONS[backend, operation]
    return getattr(_module(module_name), function)  # type: ignore[no-any-return]


def _why_not_here(backend: BackendName, device: torch.device) -> str:
    kind = _info(device).kind
    if backend == "cpu" and kind != "cpu":
        return f"it is for CPUs, and this is {_info(device).name}"
    if backend == "cuda" and kind != "cuda":
        return f"it is for NVIDIA GPUs, and this is {_info(device).name}"
    if backend == "triton" and kind == "cpu" and not _is_interpreted():
        return "on a CPU it runs only under TRITON_INTERPRET=1"
    return ""


def _is_to_compare_with(subject: Subject) -> bool:
    """Formats and rules of `luq.py`."""
    if isinstance(subject, Quantizer):
        return subject.scale_rule == "sawb" or subject.block_format.name not in BLOCK_FORMATS
    return any(block_format.name not in BLOCK_FORMATS for block_format in subject)


def _in_words(operation: Operation, subject: Subject) -> str:
    if isinstance(subject, Quantizer):
        return f"store {subject.block_format.name}"
    left, right = subject
    which = "multiply" if operation == "multiply" else "multiply experts of"
    return f"{which} {left.name} by {right.name}"


def _is_interpreted() -> bool:
    from parallel.device import has_triton

    if not has_triton():
        return False
    import os

    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _info(device: torch.device) -> DeviceInfo:
    return device_info(device)


def _module(name: str) -> Any:
    return import_module(f"megatron_ext.precision.{name}")
