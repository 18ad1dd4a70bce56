"""`megatron-ext doctor`: what is installed, what is missing, and what each lack turns off."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib import metadata, util

from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
    for tool, consequence in (
        ("nvcc", "building the CUDA kernels"),
        ("srun", "starting ranks with Slurm"),
    ):
        table.add_row(tool, shutil.which(tool) or "not on PATH", consequence)
    console.print(table)
    if missing:
        console.print(f"missing: {', '.join(missing)}; run pip install megatron-ext", markup=False)
        return 1
    _print_device(console)
    return 0


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _print_device(console: Console) -> None:
    # Only now, for it loads torch.
    import torch

    from parallel.device import device_info

    info = device_info()
    has_bf16 = "in hardware" if info.has_bf16_hardware else "not in hardware, so fp32 is used"
    count = torch.cuda.device_count() if info.kind != "cpu" else 1
    console.print(
        f"device: {count} x {info.name} ({info.kind}, {info.architecture}), "
        f"{info.memory_bytes / 2**30:.1f} GiB; bf16 {has_bf16}; torch threads "
        f"{torch.get_num_threads()}",
        markup=False,
    )
