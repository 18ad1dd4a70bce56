"""The device and number format of a run, chosen or as asked, with the reason."""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
import sys
from dataclasses import dataclass
from functools import cache

import torch

from megatron_ext.config import Config
from megatron_ext.errors import UserError
from parallel.device import DeviceInfo, Peak, device_info, peak_or_measure


@dataclass(frozen=True, slots=True)
class RunDevice:
    """What this rank computes on, and why in this number format."""

    device: torch.device
    info: DeviceInfo
    dtype: torch.dtype
    dtype_reason: str
    peak: Peak | None
    """What MFU is measured against; None for an accelerator without a data sheet here."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def peak_flops(self) -> float:
        """FLOP/s; not a number where it is unknown."""
        return self.peak.flops_per_second if self.peak else math.nan

    def synchronize(self) -> None:
        """Wait for the device, so that a clock tells the truth."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def release_memory(self) -> None:
        """Give freed host memory back to the system, on a CPU rank with glibc.

        Micro-batches of ever different lengths leave holes in the heap; without this a rank's
        resident memory doubles within a hundred steps.
        """
        if not self.is_cuda and sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)

    def describe(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        peak = (
            f"MFU against {self.peak.flops_per_second / 1e12:.3g} TFLOP/s ({self.peak.source})"
            if self.peak
            else "no peak known, so no MFU"
        )
        return f"{self.info.name}, {dtype} ({self.dtype_reason}); {peak}"


def choose_device_type(config: Config) -> str:
    """ "cpu" or "cuda", before any rank touches a device."""
    asked = config.launch.device
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise UserError(
            "launch.device=cuda, but torch sees no GPU here; install a CUDA or ROCm build of "
            "torch, or use --device cpu"
        )
    return "cuda" if asked != "cpu" and has_gpu else "cpu"


def choose_dtype(config: Config, info: DeviceInfo) -> tuple[torch.dtype, str]:
    """The number format of weights and activations, and why."""
    if config.precision.dtype == "fp32":
        return torch.float32, "as configured"
    if config.precision.dtype == "bf16":
        return torch.bfloat16, "as configured"
    if info.has_bf16_hardware:
        return torch.bfloat16, "the device has it in hardware"
    return torch.float32, "the device has no bf16 hardware"


def open_device(config: Config, device: torch.device) -> RunDevice:
    """Look at the device; on a CPU all ranks should call this together, for they share it."""
    info = device_info(device)
    dtype, reason = choose_dtype(config, info)
    peak = _measured_once(dtype, device, torch.get_num_threads())
    return RunDevice(device, info, dtype, reason, peak)


@cache
def _measured_once(dtype: torch.dtype, device: torch.device, num_threads: int) -> Peak | None:
    # A CPU's is measured for a fifth of a second; a process may open many runs.
    return peak_or_measure(dtype, device=device)


def peak_memory_bytes(device: RunDevice) -> int:
    """Most memory this rank has held: allocated on a GPU, resident on a CPU."""
    if device.is_cuda:
        return torch.cuda.max_memory_allocated(device.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
