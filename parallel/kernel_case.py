"""What a Triton kernel is compiled for, as data: types, constants, and what must come out of it.

A kernel runs on devices that are not here, so its machine code is looked at instead: each file with
Triton kernels has a function `kernel_cases()` with a case or more for each kernel, which say

    types and constants      as the launch on real sizes has them
    expects                  for each target strings that its assembly text must contain

`scripts/bench/compile_targets.py` compiles all cases for all targets; a test compiles some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of GPU that code is made for.

    Attributes:
        name: "sm_90", "gfx942" and the like.
        backend, architecture, warp_size: as Triton's `GPUTarget` has them.
        text: the readable form of the machine code that Triton gives.
    """

    name: str
    backend: Literal["cuda", "hip"]
    architecture: int | str
    warp_size: int
    text: Literal["ptx", "amdgcn"]


CUDA_TARGETS = tuple(Target(f"sm_{number}", "cuda", number, 32, "ptx") for number in (90, 100, 120))
HIP_TARGETS = tuple(
    Target(name, "hip", name, 64, "amdgcn") for name in ("gfx90a", "gfx942", "gfx950")
)
TARGETS = CUDA_TARGETS + HIP_TARGETS


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One way to compile one kernel.

    Attributes:
        kernel: the function under `@triton.jit`.
        name: what is special about the case, such as "e4m3"; "" where a kernel has only one.
        signature: type of each argument that is no constant: "*bf16", "i32", "fp32",
            "tensordesc<fp8e4nv[128, 128]>"; see `argument_types`.
        constants: values of the `tl.constexpr` arguments.
        expects: for each target it is compiled for, by name, what its text must contain.
        forbids: likewise, what it must not contain.
        unaligned: arguments that are no multiples of 16; all other pointers and integers are.
        num_warps, num_stages: as at the launch; None: Triton's own choice.
        options: further options of the launch, such as {"enable_fp_fusion": False}.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    expects: Mapping[str, tuple[str, ...]]
    name: str = ""
    forbids: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unaligned: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        kernel = str(self.kernel.__name__)
        return f"{kernel}[{self.name}]" if self.name else kernel


def argument_types(kernel: Any, types: Mapping[str, str], default: str = "i32") -> dict[str, str]:
    """A signature from a table that several kernels share: types by name, `default` for others.

    Arguments that the kernel marks `tl.constexpr` are left out.
    """
    constants = {kernel.arg_names[place] for place in kernel.constexprs}
    return {name: types.get(name, default) for name in kernel.arg_names if name not in constants}


def on_all_targets(
    *, ptx: tuple[str, ...] = (), amdgcn: tuple[str, ...] = (), **special: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """`expects` of a case that is compiled for every target.

    Args:
        ptx, amdgcn: what the text of all CUDA or HIP targets must contain.
        special: by target's name, what its text must contain instead.
    """
    by_text = {"ptx": ptx, "amdgcn": amdgcn}
    return {target.name: special.get(target.name, by_text[target.text]) for target in TARGETS}
