"""Which Triton kernels there are in the tree, and which of their files' cases compile them."""

from __future__ import annotations

import contextlib
import importlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.kernel_case import TARGETS, KernelCase
from scripts.bench.compiled import Compiled, found_and_missing

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("parallel", "moe", "megatron_ext")


@dataclass(frozen=True, slots=True)
class TritonJob:
    """One case of one file, for one target; small enough to be sent to a process."""

    module: str
    place: int
    label: str
    target: str

    def run(self) -> Compiled:
        from parallel.compile_triton import compile_case

        case = module_cases(self.module)[self.place]
        target = next(target for target in TARGETS if target.name == self.target)
        began = time.perf_counter()
        try:
            # Triton prints all of a program that the assembler refuses.
            with contextlib.redirect_stdout(io.StringIO()):
                code = compile_case(case, target)
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            return Compiled(self.label, self.target, error=message[:600])
        found, missing = found_and_missing(case.expects[self.target], [code.text])
        return Compiled(
            self.label,
            self.target,
            found=found,
            missing=missing,
            forbidden=tuple(s for s in case.forbids.get(self.target, ()) if s in code.text),
            num_registers=code.num_registers,
            shared_bytes=code.shared_bytes,
            spilled_bytes=code.spilled_bytes,
            seconds=time.perf_counter() - began,
        )


def triton_modules(root: Path = ROOT) -> Iterator[str]:
    """Dotted names of the files that have kernels, or cases of them."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*_triton.py")):
            text = path.read_text(encoding="utf-8")
            if "@triton.jit" in text or "def kernel_cases(" in text:
                yield ".".join(path.relative_to(root).with_suffix("").parts)


def module_cases(name: str) -> tuple[KernelCase, ...]:
    """Of a file with Triton kernels; none where it does not say."""
    module = importlib.import_module(name)
    return tuple(module.kernel_cases()) if hasattr(module, "kernel_cases") else ()


def triton_jobs(name: str) -> list[TritonJob]:
    """All cases of a file for all their targets."""
    return [
        TritonJob(name, place, f"{name}.{case.label}", target)
        for place, case in enumerate(module_cases(name))
        for target in case.expects
    ]


def uncovered(names: Sequence[str]) -> list[str]:
    """Kernels of these files that no case compiles, or not for every target.

    A function that a kernel calls is compiled with it.
    """
    from parallel.compile_triton import entry_kernels

    cases = [case for name in names for case in module_cases(name)]
    problems = []
    for kernel in entry_kernels(importlib.import_module(name) for name in names):
        covered = {target for case in cases if case.kernel is kernel for target in case.expects}
        left_out = [target.name for target in TARGETS if target.name not in covered]
        if left_out:
            label = f"{kernel.__module__}.{kernel.__name__}"
            problems.append(f"{label}: kernel_cases() has no case for {', '.join(left_out)}")
    return problems
