"""Compiles Triton kernels for GPUs that are not here, and reads what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from parallel.kernel_case import KernelCase, Target


@dataclass(frozen=True, slots=True)
class MachineCode:
    """One kernel for one target.

    Attributes:
        text: PTX or amdgcn assembly.
        num_registers: of a thread (vector registers on HIP).
        shared_bytes: memory that a block's threads share.
        spilled_bytes: of a thread, kept in memory because registers ran out.
    """

    text: str
    num_registers: int
    shared_bytes: int
    spilled_bytes: int


def compile_case(case: KernelCase, target: Target) -> MachineCode:
    """Triton keeps what it compiled in its cache; a second time only reads it.

    Raises whatever Triton raises where the kernel does not compile.
    """
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        case.kernel,
        signature,
        constexprs=dict(case.constants),
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if re.match(r"\*|[iu]\d", signature[name]) and name not in case.unaligned
        },
    )
    # The environment may say otherwise, so say what the launch's default is.
    options: dict[str, Any] = {"num_warps": case.num_warps, "enable_fp_fusion": True}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    compiled = triton.compile(
        source,
        target=GPUTarget(target.backend, target.architecture, target.warp_size),
        options=options | dict(case.options),
    )
    text = str(compiled.asm[target.text])
    shared_bytes = int(compiled.metadata.shared)
    if target.backend == "hip":
        return MachineCode(text, *_hip_registers(text, shared_bytes))
    return MachineCode(text, *_cuda_registers(compiled.asm["cubin"], shared_bytes))


def _hip_registers(text: str, shared_bytes: int) -> tuple[int, int, int]:
    """From the metadata at the end of the assembly text."""

    def number(key: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{key}:\s+(\d+)", text, re.M)
        return int(found[1]) if found else 0

    shared = max(shared_bytes, number("group_segment_fixed_size"))
    return number("vgpr_count"), shared, number("private_segment_fixed_size")


def _cuda_registers(cubin: bytes, shared_bytes: int) -> tuple[int, int, int]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, static = (
        int(found[1]) if (found := re.search(rf"\b{key}:(\d+)", listing)) else 0
        for key in ("REG", "STACK", "SHARED")
    )
    return registers, max(shared_bytes, static), stack


def entry_kernels(modules: Iterable[ModuleType]) -> list[Any]:
    """Functions under `@triton.jit` in these modules that no other one of them calls."""
    functions = [function for module in modules for function in _own_functions(module)]
    called = {
        id(used)
        for caller in functions
        for name in caller.fn.__code__.co_names
        if (used := caller.fn.__globals__.get(name)) is not caller
    }
    return [function for function in functions if id(function) not in called]


def _own_functions(module: ModuleType) -> Iterator[Any]:
    for value in vars(module).values():
        # An autotuner stands around the function.
        function = getattr(value, "fn", value) if not isinstance(value, JITFunction) else value
        if isinstance(function, JITFunction) and function.__module__ == module.__name__:
            yield function
