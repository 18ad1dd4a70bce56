"""Which accelerators are here and what they multiply in few bits, asked without torch: in
milliseconds, from NVIDIA's management library and from Linux's list of AMD devices.

| | FP8 | FP4 |
|---|---|---|
| NVIDIA | 8.9 (Ada), 9.0 (Hopper) and above | 10.0 (Blackwell) and above |
| AMD | gfx942 (of another encoding), gfx950 | gfx950 |
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NVML = "libnvidia-ml.so.1"
_AMD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """`capability` as in (9, 0) for NVIDIA's; `gfx` as in "gfx90a" for AMD's."""

    name: str
    capability: tuple[int, int] | None = None
    gfx: str | None = None

    @property
    def has_fp8(self) -> bool:
        if self.capability is not None:
            return self.capability >= (8, 9)
        return self.gfx in ("gfx942", "gfx950")

    @property
    def has_fp4(self) -> bool:
        if self.capability is not None:
            return self.capability >= (10, 0)
        return self.gfx == "gfx950"


def accelerators() -> list[Accelerator]:
    return nvidia_devices() + amd_devices()


def nvidia_devices(library: str = _NVML) -> list[Accelerator]:
    """Empty where there is no driver."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    count = ctypes.c_uint()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    found = [_nvidia_device(nvml, index) for index in range(count.value)]
    nvml.nvmlShutdown()
    return [device for device in found if device is not None]


def _nvidia_device(nvml: ctypes.CDLL, index: int) -> Accelerator | None:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        or nvml.nvmlDeviceGetName(handle, name, len(name))
        or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    )
    if failed:
        return None
    return Accelerator(name.value.decode(errors="replace"), (major.value, minor.value))


def amd_devices(nodes: Path = _AMD_NODES) -> list[Accelerator]:
    """Empty where the driver is not loaded. A number like 90010 stands for gfx90a."""
    devices = []
    for path in sorted(nodes.glob("*/properties")):
        try:
            text = path.read_text(encoding="ascii", errors="replace")
        except OSError:
            # Nodes of devices that belong to another container.
            continue
        fields = dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line)
        version = int(fields.get("gfx_target_version", "0"))
        if version:
            major, minor, stepping = version // 10000, version // 100 % 100, version % 100
            gfx = f"gfx{major}{minor:x}{stepping:x}"
            devices.append(Accelerator(f"AMD {gfx}", gfx=gfx))
    return devices


def hardware_summary(devices: Sequence[Accelerator], bits: int) -> str:
    """As in "8 x NVIDIA H100 80GB HBM3 (9.0)", or that there is none."""
    able = [device for device in devices if (device.has_fp8 if bits == 8 else device.has_fp4)]
    if not able:
        return "none" if devices else "no accelerator"
    counts: dict[str, int] = {}
    for device in able:
        name = device.name
        if device.capability is not None:
            name += " ({}.{})".format(*device.capability)
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items())
