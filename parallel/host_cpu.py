"""The processor and the memory of this machine, asked without torch."""

import os
import platform
from functools import cache
from pathlib import Path


@cache
def cpu_has_bf16_hardware() -> bool:
    """Whether the CPU multiplies bfloat16 itself: avx512_bf16 or amx on x86, bf16 on Linux Arm.

    False on macOS: torch's CPU build there has no bfloat16 matrix kernels, whatever the chip can.
    """
    if not Path("/proc/cpuinfo").exists():
        return False
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(line.split())
    return False


def cpu_name() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def host_memory_bytes() -> int:
    """Of the whole machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def num_usable_cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
