"""Kernels of few bits on one GPU: are they right, how fast are they, do they pass their gates?

    python scripts/bench/precision.py [--json FILE]                    on an H100, under 8 minutes
    python scripts/bench/precision.py --device cpu --quick             the same code at small sizes

Parts run in processes of their own, checks at the same time and timings one after another: a kernel
that crashes, hangs or leaves the GPU unusable ends its part alone. Exit code 0: every gate passes
(on a CPU, where none applies: nothing failed); 1: one does not; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from parallel.device import device_info, has_triton
from scripts.bench.kernel_timing import clocks
from scripts.bench.precision_bench import Bench, Settings, in_words, own_backends
from scripts.bench.precision_checks import check_experts, check_products, check_stores
from scripts.bench.precision_fused import check_fused, time_fused
from scripts.bench.precision_products import product_cases, time_experts, time_products
from scripts.bench.precision_report import (
    Record,
    exit_code,
    from_lines,
    gate_lines,
    gates_of,
    record_lines,
)
from scripts.bench.precision_stores import time_layers, time_stores

# Seconds of the whole run, and the most that one part gets of them.
_LIMIT, _PART_LIMIT = 460.0, 150.0
_CHECKS_AT_ONCE = 8
_NO_GPU = (
    "there is no GPU that torch can use here, and these are measurements on one; "
    "--device cpu --quick runs the same code at small sizes on this CPU"
)


@dataclass(frozen=True, slots=True)
class Part:
    """is_timed: has the GPU to itself."""

    name: str
    run: Callable[[Bench], None]
    is_timed: bool


def parts_of(device: str) -> dict[str, Part]:
    """In the order in which they run."""
    own = own_backends(device)
    found = []
    for backend in own:
        for name, check in (
            ("stores", check_stores),
            ("products", check_products),
            ("experts", check_experts),
            ("fused", check_fused),
        ):
            if name != "fused" or backend == "triton":
                found.append(Part(f"check {name} {backend}", _bound(check, backend), False))
    found.append(Part("check products scaled_mm", _bound(check_products, "scaled_mm"), False))
    for name, timing in (
        ("products", time_products),
        ("experts", time_experts),
        ("stores", time_stores),
        ("fused", time_fused),
        ("layers", time_layers),
    ):
        for backend in own:
            if name != "fused" or backend == "triton":
                found.append(Part(f"time {name} {backend}", _bound(timing, backend), True))
    return {part.name: part for part in found}


def run_here(part: Part, settings: Settings, file: Path | None = None) -> list[Record]:
    """In this process. What nobody expected becomes a record, too."""
    bench = Bench(settings, part.name, file)
    torch.manual_seed(0)
    try:
        part.run(bench)
    except Exception as error:
        bench.add(part.name, _backend_of(part.name), "", "error", in_words(error))
    return bench.records


def run_apart(name: str, command: Sequence[str], limit_seconds: float) -> list[Record]:
    """In a process of its own, `command` and the file for its records; those that it left."""
    if limit_seconds <= 0:
        reason = "the run's time was over before this part"
        return [Record(name, name, _backend_of(name), "", "error", reason)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records"
        file.touch()
        problem = ""
        try:
            done = subprocess.run(
                [*command, str(file)],
                capture_output=True,
                text=True,
                check=False,
                timeout=limit_seconds,
                env=_environment(),
            )
            if done.returncode:
                last = " | ".join(done.stderr.strip().splitlines()[-3:])
                problem = f"its process ended with {done.returncode}: {last[-400:]}"
        except subprocess.TimeoutExpired:
            problem = f"not done after {limit_seconds:.0f} s"
        records = from_lines(file.read_text())
    if problem:
        records.append(Record(name, name, _backend_of(name), "", "error", problem))
    return records


def run_all(parts: Sequence[Part], settings: Settings, *, in_one_process: bool) -> list[Record]:
    """Checks, then timings. Prints each part's name and time as it ends."""
    began = time.monotonic()

    def run(part: Part) -> list[Record]:
        started = time.monotonic()
        if in_one_process:
            records = run_here(part, settings)
        else:
            left = _LIMIT - (started - began)
            records = run_apart(part.name, _command(part, settings), min(left, _PART_LIMIT))
        print(f"{time.monotonic() - started:6.1f} s  {part.name}", flush=True)
        return records

    checks = [part for part in parts if not part.is_timed]
    found: list[Record] = []
    # Threads only wait for processes; in one process they would share torch's one device.
    with ThreadPoolExecutor(1 if in_one_process else _CHECKS_AT_ONCE) as pool:
        for records in pool.map(run, checks):
            found += records
    for part in parts:
        if part.is_timed:
            found += run(part)
    return found


def report(records: Sequence[Record], settings: Settings, seconds: float) -> dict[str, Any]:
    """What is written as JSON."""
    gates = gates_of(records, product_cases(settings))
    info = device_info(settings.device)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": info.name,
        "architecture": info.architecture,
        "host": platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "clocks": clocks(),
        "is_quick": settings.is_quick,
        "seconds": seconds,
        "gates_apply": settings.device == "cuda" and not settings.is_quick,
        "gates": [asdict(gate) for gate in gates],
        "records": [asdict(record) for record in records],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        print(_NO_GPU, file=sys.stderr)
        return 2
    settings = Settings(parsed.device, parsed.quick)
    known = parts_of(parsed.device)
    if parsed.one_part is not None:
        name, file = parsed.one_part
        run_here(known[name], settings, Path(file))
        return 0
    parts = [part for name, part in known.items() if not parsed.parts or parsed.parts in name]
    if not parts:
        print(f"no part has {parsed.parts!r} in its name: {', '.join(known)}", file=sys.stderr)
        return 1
    began = time.monotonic()
    records = run_all(parts, settings, in_one_process=parsed.in_one_process)
    found = report(records, settings, time.monotonic() - began)
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(found, indent=1) + "\n")
    gates = gates_of(records, product_cases(settings))
    print(f"\n{found['device']}, {found['date']}, torch {found['torch']}")
    print(*record_lines(records), sep="\n")
    if found["gates_apply"]:
        print(*gate_lines(gates), sep="\n")
    else:
        print("gates are for full sizes on a GPU and do not apply here: not measured on a GPU")
    return exit_code(gates, records, is_gpu=found["gates_apply"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", default="", help="only parts with this in their name")
    parser.add_argument(
        "--in-one-process", action="store_true", help="a crash then ends the run; starts faster"
    )
    parser.add_argument("--one-part", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    return parser


def _bound(run: Callable[[Bench, Any], None], backend: str) -> Callable[[Bench], None]:
    return lambda bench: run(bench, backend)


def _command(part: Part, settings: Settings) -> list[str]:
    quick = ["--quick"] if settings.is_quick else []
    start = [sys.executable, os.path.abspath(__file__), "--device", settings.device]
    return [*start, *quick, "--one-part", part.name]


def _environment() -> dict[str, str]:
    """Checks share the processor, on which their reference runs."""
    threads = max(1, (os.cpu_count() or 1) // _CHECKS_AT_ONCE)
    return {"OMP_NUM_THREADS": str(threads)} | os.environ


def _backend_of(name: str) -> str:
    return name.rpartition(" ")[2]


def _triton_version() -> str | None:
    return version("triton") if has_triton() else None


if __name__ == "__main__":
    sys.exit(main())
