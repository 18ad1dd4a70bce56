"""The one door to the CUDA extension: the library that setup.py builds when it is asked to.

    MEGATRON_EXT_BUILD_CUDA=1 pip install --no-build-isolation -e .

It registers `torch.ops.megatron_ext_cuda.*` (csrc/bindings.cpp). Without it everything that it does
is done by Triton or in plain torch, and whoever asks for it by name is told why it is not there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from megatron_ext.cuda_compiler import HOW_TO_BUILD, cuda_library


def why_no_cuda_extension(device: torch.device | None = None) -> str | None:
    """None where the CUDA kernels can be used on a GPU of this process, else the reason."""
    if device is not None and device.type != "cuda":
        return f"the CUDA extension is for NVIDIA GPUs; this is a {device.type} device"
    library = cuda_library()
    if library is None:
        return f"the CUDA extension is not built: {HOW_TO_BUILD}"
    if torch.version.cuda is None:
        return "the CUDA extension needs a CUDA build of torch; this one has none"
    if not torch.cuda.is_available():
        return "the CUDA extension needs an NVIDIA GPU; torch finds none"
    return _why_not_loaded(str(library))


def cuda_ops() -> Any:
    """`torch.ops.megatron_ext_cuda`. RuntimeError with the reason where there is none."""
    reason = why_no_cuda_extension()
    if reason is not None:
        raise RuntimeError(reason)
    return torch.ops.megatron_ext_cuda


@cache
def _why_not_loaded(library: str) -> str | None:
    """Loads it once; a build for another torch fails with its symbols."""
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{library} does not load: {error}; {HOW_TO_BUILD}"
    return None
