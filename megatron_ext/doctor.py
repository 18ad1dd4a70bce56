"""`megatron-ext doctor`: what is installed, what is missing, and what each lack turns off."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib import metadata, util

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_ext.cuda_compiler import HOW_TO_BUILD, HOW_TO_INSTALL, cuda_library, find_nvcc
from megatron_ext.device_probe import accelerators, hardware_summary
from parallel.host_cpu import (
    cpu_has_bf16_hardware,
    cpu_name,
    host_memory_bytes,
    num_usable_cores,
)

_REQUIRED = (
    "torch",
    "megatron-core",
    "numpy",
    "PyYAML",
    "pydantic",
    "rich",
    "tokenizers",
    "zstandard",
    "safetensors",
    "matplotlib",
    "psutil",
)
# (distribution, module, what its absence turns off)
_OPTIONAL = (
    ("pyarrow", "pyarrow", "reading .parquet; install 'megatron-ext[parquet]'"),
    ("flash-attn", "flash_attn", "nothing: torch's own flash attention serves"),
    ("tensorboard", "tensorboard", "log.tensorboard; install 'megatron-ext[tensorboard]'"),
    ("wandb", "wandb", "log.wandb_project; install 'megatron-ext[wandb]'"),
    ("triton", "triton", "Triton kernels; plain torch serves"),
    (
        "transformer_engine",
        "transformer_engine",
        "Transformer Engine's linear layers; the project's own recipes serve",
    ),
)


def doctor() -> int:
    """Print the table; the exit code is 1 when something that every run needs is missing."""
    console = Console(highlight=False)
    console.print(
        f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}",
        markup=False,
    )
    table = Table("package", "version", "without it")
    missing = []
    for name in _REQUIRED:
        version = _version(name)
        if version is None:
            missing.append(name)
        table.add_row(name, version or "MISSING", "nothing runs")
    for name, module, consequence in _OPTIONAL:
        found = util.find_spec(module) is not None
        version = _version(name) if found else None
        table.add_row(name, version or ("found" if found else "not installed"), escape(consequence))
    table.add_row("srun", shutil.which("srun") or "not on PATH", "starting ranks with Slurm")
    for row in _kernel_rows():
        table.add_row(*map(escape, row))
    console.print(table)
    if missing:
        console.print(f"missing: {', '.join(missing)}; run pip install megatron-ext", markup=False)
        return 1
    _print_device(console)
    return 0


def _kernel_rows() -> list[tuple[str, str, str]]:
    """What products in few bits run on."""
    nvcc, library, devices = find_nvcc(), cuda_library(), accelerators()
    emulated = "emulated: rounded as the format says, multiplied in more bits"
    return [
        (
            "nvcc",
            "not found" if nvcc is None else str(nvcc),
            f"building the CUDA kernels; {HOW_TO_INSTALL}",
        ),
        (
            "CUDA kernels",
            "not built" if library is None else library.name,
            f"CUDA kernels; Triton or plain torch serve; {HOW_TO_BUILD}",
        ),
        ("FP8 hardware", hardware_summary(devices, 8), f"fp8 and mxfp8 recipes are {emulated}"),
        ("FP4 hardware", hardware_summary(devices, 4), f"nvfp4 and quartet recipes are {emulated}"),
    ]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _print_device(console: Console) -> None:
    found = accelerators()
    if not found:
        bf16 = "in hardware" if cpu_has_bf16_hardware() else "not in hardware, so fp32 is used"
        console.print(
            f"device: CPU, {cpu_name()}, {num_usable_cores()} cores, "
            f"{host_memory_bytes() / 2**30:.1f} GiB; bf16 {bf16}",
            markup=False,
        )
        return
    # Whether torch sees what is there only torch can say, which takes seconds to load.
    import torch

    from parallel.device import device_info

    info = device_info()
    if info.kind == "cpu":
        console.print(
            f"device: CPU; {len(found)} x {found[0].name} is here, but torch {torch.__version__} "
            "does not see it: install a build of torch for it, and look at its driver",
            markup=False,
        )
        return
    bf16 = "in hardware" if info.has_bf16_hardware else "not in hardware, so fp32 is used"
    console.print(
        f"device: {torch.cuda.device_count()} x {info.name} ({info.kind}, {info.architecture}), "
        f"{info.memory_bytes / 2**30:.1f} GiB; bf16 {bf16}",
        markup=False,
    )
