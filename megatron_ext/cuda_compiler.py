"""Where the CUDA compiler is, and what it has built. Standard library only: setup.py needs it.

The compiler may be

on the path, where CUDA_HOME says, where CUDA is usually installed, or as PyPI has it:

    pip install 'megatron-ext[cuda-compiler]'
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

HOW_TO_INSTALL = (
    "install CUDA 13 and put its bin folder on PATH, or pip install 'megatron-ext[cuda-compiler]'"
)

HOW_TO_BUILD = (
    "build it with MEGATRON_EXT_BUILD_CUDA=1 pip install --no-build-isolation -e . "
    "(needs nvcc and a CUDA build of torch)"
)
LIBRARY_PREFIX = "_cuda_kernels"


def cuda_library(folder: Path = Path(__file__).parent / "precision") -> Path | None:
    """Where the built extension lies, if it does."""
    return next(iter(sorted(folder.glob(f"{LIBRARY_PREFIX}*.so"))), None)


def find_nvcc(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The compiler itself, with links followed; None where there is none."""
    folders = [environment.get("PATH", "")]
    folders += [
        f"{environment[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in environment
    ]
    folders += ["/usr/local/cuda/bin", *map(str, _pypi_folders())]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    return None if found is None else Path(found)


def nvcc_version(nvcc: Path) -> str | None:
    """As in "13.0"; None where it does not answer."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    return None if match is None else match[1]


def cuda_root(nvcc: Path) -> Path:
    """The folder with bin, include and lib that an nvcc belongs to: it says so itself.

    A script on the path may only start the real one.
    """
    command = [str(nvcc), "-dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(match[1]).resolve() if match else nvcc.resolve().parent.parent


def cutlass_includes() -> list[Path]:
    """Folders of CUTLASS's headers, of the package nvidia-cutlass; none where it is not there."""
    spec = find_spec("cutlass_library")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "source" / "include"
        if folder.is_dir():
            return [folder, Path(place) / "source" / "tools" / "util" / "include"]
    return []


def _pypi_folders() -> list[Path]:
    spec = find_spec("nvidia")
    places = (spec.submodule_search_locations or ()) if spec else ()
    return [folder for place in places for folder in sorted(Path(place).glob("cu*/bin"))]
