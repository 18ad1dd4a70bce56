"""What this machine is: CPU, CUDA or ROCm, and how fast.

Model FLOP utilisation divides by a peak, so the peak must be named. Accelerators have a data sheet:
the dense figure for one device as torch sees it (an MI250X is two devices). A CPU has none worth
using, since clocks, cores and containers decide; there the peak is measured with a matrix product.

Nothing here runs at import, and CUDA is asked only when a CUDA device is described.
"""

import platform
import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from parallel.device_peaks import DataSheet, data_sheet
from parallel.host_cpu import cpu_has_bf16_hardware, cpu_name, host_memory_bytes

_MIN_PRODUCTS = 8

DeviceKind = Literal["cpu", "cuda", "rocm"]


@dataclass(frozen=True, slots=True)
class Peak:
    """A device's greatest speed and where the figure comes from."""

    flops_per_second: float
    source: str
    """For the log, such as "data sheet of NVIDIA H100 SXM"."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device that a rank computes on."""

    kind: DeviceKind
    name: str
    architecture: str
    """"sm_90", "gfx90a", "x86_64" and the like."""
    memory_bytes: int
    """Of the device; on a CPU, of the whole machine."""
    has_bf16_hardware: bool
    sheet: DataSheet | None
    """The data sheet's figures, where the device is known."""

    def peak(self, dtype: torch.dtype) -> Peak | None:
        """The data sheet's dense peak for matrix products, None where there is no figure."""
        flops = self.sheet.flops_per_second.get(_dtype_name(dtype)) if self.sheet else None
        if self.sheet is None or flops is None:
            return None
        return Peak(flops, f"data sheet of {self.sheet.name}")


def device_info(device: torch.device | str | None = None) -> DeviceInfo:
    """Describe `device`; without one, the current accelerator, or the CPU if there is none."""
    if device is None:
        device = "cuda" if _has_accelerator() else "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu_info()
    if device.type == "cuda":
        return _accelerator_info(device)
    raise ValueError(f"no description for device {device}; there are cpu and cuda (also for ROCm)")


def default_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32."""
    return torch.bfloat16 if device_info(device).has_bf16_hardware else torch.float32


def peak_or_measure(dtype: torch.dtype, *, device: torch.device | str | None = None) -> Peak | None:
    """The data sheet's peak; on a CPU a measured one; None for an accelerator without a figure."""
    info = device_info(device)
    if info.kind == "cpu":
        return measure_peak_flops(dtype)
    return info.peak(dtype)


def measure_peak_flops(dtype: torch.dtype, *, size: int = 768, budget_seconds: float = 0.2) -> Peak:
    """The best speed of a [size, size] product on the CPU, with the threads torch has now.

    The best and not the mean: other processes can only make it slower. Takes `budget_seconds`, or
    `_MIN_PRODUCTS` products where a busy machine makes single ones slow.
    """
    left = torch.randn(size, size).to(dtype)
    right = torch.randn(size, size).to(dtype)
    product = torch.mm(left, right)
    best_seconds = float("inf")
    end = time.perf_counter() + budget_seconds
    num_products = 0
    while time.perf_counter() < end or num_products < _MIN_PRODUCTS:
        num_products += 1
        begin = time.perf_counter()
        torch.mm(left, right, out=product)
        best_seconds = min(best_seconds, time.perf_counter() - begin)
    num_threads = torch.get_num_threads()
    source = f"measured: {size}^3 {_dtype_name(dtype)} product, {num_threads} thread(s)"
    return Peak(2 * size**3 / best_seconds, source)


@cache
def has_triton() -> bool:
    """Whether Triton is installed, without importing it; kernels of CUDA and ROCm ask."""
    return find_spec("triton") is not None


def _has_accelerator() -> bool:
    # A CPU build answers here, before anything that poses as an accelerator is asked.
    built = torch.version.cuda is not None or torch.version.hip is not None
    return built and torch.cuda.is_available()


def _cpu_info() -> DeviceInfo:
    return DeviceInfo(
        kind="cpu",
        name=cpu_name(),
        architecture=platform.machine(),
        memory_bytes=host_memory_bytes(),
        has_bf16_hardware=cpu_has_bf16_hardware(),
        sheet=None,
    )


def _accelerator_info(device: torch.device) -> DeviceInfo:
    properties = torch.cuda.get_device_properties(device)
    is_rocm = torch.version.hip is not None
    if is_rocm:
        # "gfx90a:sramecc+:xnack-": the part before the first colon is the architecture.
        architecture = str(properties.gcnArchName).partition(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return DeviceInfo(
        kind="rocm" if is_rocm else "cuda",
        name=properties.name,
        architecture=architecture,
        memory_bytes=properties.total_memory,
        has_bf16_hardware=architecture.startswith("gfx9") if is_rocm else properties.major >= 8,
        sheet=data_sheet(properties.name, architecture=architecture),
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
