"""Data sheets of the accelerators we may meet: dense matrix products and memory, one device each.

Vendors like to print figures "with sparsity"; these are without, half of those. One device is what
torch counts as one: half of an MI250X (a GCD), one GPU of a GB200. float32 is the plain figure,
not TF32. Sources: NVIDIA A100, H100, H200, Blackwell (HGX B200/B300, GB200/GB300 NVL72) and AMD
Instinct MI250X, MI300X, MI325X, MI355X data sheets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_TERA = 1e12


@dataclass(frozen=True, slots=True)
class DataSheet:
    """Peak figures of one device."""

    name: str
    flops_per_second: Mapping[str, float]
    """By dtype name as torch prints it, without "torch."; no entry where there is no hardware."""
    memory_bytes_per_second: float


def _sheet(
    name: str, *, half: float, single: float, eight: float | None, memory: float
) -> DataSheet:
    """All in units of 1e12: 16-bit, float32 and 8-bit floating-point operations; bytes."""
    flops = {"bfloat16": half * _TERA, "float16": half * _TERA, "float32": single * _TERA}
    if eight is not None:
        flops |= {"float8_e4m3fn": eight * _TERA, "float8_e5m2": eight * _TERA}
    return DataSheet(name, MappingProxyType(flops), memory * _TERA)


# Searched from top to bottom for a name all of whose words appear in torch's device name.
_BY_NAME: tuple[tuple[str, DataSheet], ...] = (
    ("GB300", _sheet("NVIDIA GB300", half=2500, single=80, eight=5000, memory=8.0)),
    ("B300", _sheet("NVIDIA B300", half=2250, single=75, eight=4500, memory=8.0)),
    ("GB200", _sheet("NVIDIA GB200", half=2500, single=80, eight=5000, memory=8.0)),
    ("B200", _sheet("NVIDIA B200", half=2250, single=75, eight=4500, memory=8.0)),
    ("GH200", _sheet("NVIDIA GH200", half=989, single=67, eight=1979, memory=4.0)),
    ("H200 NVL", _sheet("NVIDIA H200 NVL", half=835, single=60, eight=1671, memory=4.8)),
    ("H200", _sheet("NVIDIA H200", half=989, single=67, eight=1979, memory=4.8)),
    ("H100 NVL", _sheet("NVIDIA H100 NVL", half=835, single=60, eight=1671, memory=3.9)),
    ("H100 PCIe", _sheet("NVIDIA H100 PCIe", half=756, single=51, eight=1513, memory=2.0)),
    ("H100", _sheet("NVIDIA H100 SXM", half=989, single=67, eight=1979, memory=3.35)),
    ("H800", _sheet("NVIDIA H800 SXM", half=989, single=67, eight=1979, memory=3.35)),
    (
        "A100 80GB PCIe",
        _sheet("NVIDIA A100 80GB PCIe", half=312, single=19.5, eight=None, memory=1.935),
    ),
    ("A100 80GB", _sheet("NVIDIA A100 80GB", half=312, single=19.5, eight=None, memory=2.039)),
    ("A100", _sheet("NVIDIA A100 40GB", half=312, single=19.5, eight=None, memory=1.555)),
    ("A800", _sheet("NVIDIA A800 80GB", half=312, single=19.5, eight=None, memory=2.039)),
    ("MI355X", _sheet("AMD MI355X", half=2516.6, single=157.3, eight=5033.2, memory=8.0)),
    ("MI325X", _sheet("AMD MI325X", half=1307.4, single=163.4, eight=2614.9, memory=6.0)),
    ("MI300X", _sheet("AMD MI300X", half=1307.4, single=163.4, eight=2614.9, memory=5.3)),
    ("MI250X", _sheet("AMD MI250X, one GCD", half=191.5, single=47.9, eight=None, memory=1.6)),
    ("MI250", _sheet("AMD MI250, one GCD", half=181.0, single=45.3, eight=None, memory=1.6)),
)

# ROCm sometimes gives a device no marketing name; then the architecture must do.
_BY_ARCHITECTURE: Mapping[str, str] = MappingProxyType(
    {"gfx90a": "MI250X", "gfx942": "MI300X", "gfx950": "MI355X"}
)


def data_sheet(device_name: str, *, architecture: str = "") -> DataSheet | None:
    """The sheet for a device as torch names it ("NVIDIA H100 80GB HBM3"), None if unknown."""
    words = device_name.replace("-", " ").split()
    for key, sheet in _BY_NAME:
        if all(word in words for word in key.split()):
            return sheet
    if architecture in _BY_ARCHITECTURE and "MI" not in device_name:
        return data_sheet(_BY_ARCHITECTURE[architecture])
    return None
