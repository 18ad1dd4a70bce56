"""How long a call takes on a device, and how fast the device copies.

On a GPU: medians of CUDA events with the L2 cache flushed in between, so that what a call reads
comes from memory. On a CPU: medians of calls.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def measure(call: Callable[[], Any], device: str, rounds: int) -> float:
    """Median seconds."""
    for _ in range(3):
        call()
    if device == "cpu":
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = []
    for _ in range(rounds):
        flush.zero_()
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    milliseconds: list[float] = [begin.elapsed_time(end) for begin, end in events]
    return statistics.median(milliseconds) / 1e3


def copy_bytes_per_second(device: str, rounds: int) -> float:
    """Bytes read and written by a copy within the device's memory."""
    # Zeros move faster than numbers do.
    source = torch.randint(256, (_COPY_BYTES[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), device, rounds)


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU now; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={_CLOCKS}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return dict(zip(_CLOCKS.split(","), done.stdout.strip().split(", "), strict=False))
