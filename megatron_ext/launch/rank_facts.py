"""What one rank is and runs on, as it can be compared with the others'."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import socket
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_ext.launch.ranks import RankInfo

# Plug-ins through which NCCL and RCCL reach a network, as they are mapped into a process.
_PLUGIN = re.compile(r"/(lib(?:n|r)ccl-net[^/ ]*|lib[^/ ]*ccl-net-ofi[^/ ]*)\.so")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """Plain values, so that they travel as JSON."""

    rank: int
    host: str
    local_rank: int
    versions: dict[str, str]
    device: str
    architecture: str
    device_id: str
    """Of the GPU on its bus; empty for a CPU."""
    network: str
    """Plug-in that is loaded, with what NCCL_NET asks for; "" where it is none's business."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> RankFacts:
        tree: dict[str, Any] = json.loads(text)
        return cls(**tree)


def host_name() -> str:
    """As Slurm calls the node, else as the machine calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def collect(info: RankInfo, device: torch.device) -> RankFacts:
    """Of this process; call it after a first collective, which loads the plug-in."""
    is_gpu = device.type == "cuda"
    return RankFacts(
        rank=info.rank,
        host=host_name(),
        local_rank=info.local_rank,
        versions=_versions(is_gpu),
        device=torch.cuda.get_device_name(device) if is_gpu else "CPU",
        architecture=_architecture(device) if is_gpu else platform.machine(),
        device_id=_device_id(device) if is_gpu else "",
        network=loaded_plugin(Path("/proc/self/maps")) if is_gpu else "",
    )


def loaded_plugin(maps: Path) -> str:
    """Names of the libraries, and what was asked for; "built in" where there is no plug-in."""
    try:
        text = maps.read_text(errors="replace")
    except OSError:
        text = ""
    found = sorted({match[1] for match in _PLUGIN.finditer(text)})
    asked = os.environ.get("NCCL_NET")
    return (", ".join(found) or "built in") + (f" (NCCL_NET={asked})" if asked else "")


def _versions(is_gpu: bool) -> dict[str, str]:
    found = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
    }
    for package in ("megatron-ext", "megatron-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "a checkout"
    if is_gpu:
        name = "rccl" if torch.version.hip else "nccl"
        nccl_version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        found[name] = ".".join(map(str, nccl_version))
        found["hip" if torch.version.hip else "cuda"] = str(torch.version.hip or torch.version.cuda)
    return found


def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "")
    return name if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def _device_id(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    return ":".join(f"{getattr(properties, name, 0):x}" for name in names)
