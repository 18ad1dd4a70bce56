"""What pyproject.toml cannot say: the optional CUDA extension.

    pip install -e .                                                    no compiler, no CUDA
    MEGATRON_EXT_BUILD_CUDA=1 pip install --no-build-isolation -e .     and the CUDA kernels

MEGATRON_EXT_CUDA_ARCHS, by default "90a;100a;120a", are the devices they are built for: Hopper,
B200, RTX 50. `csrc/targets.toml` lists the files; each is compiled for those of its targets that
are asked for. Whoever asks for kernels and cannot have them is told what is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# Where setuptools runs this file the project is not on the path yet.
sys.path.insert(0, str(ROOT))

from megatron_ext.cuda_compiler import (  # noqa: E402
    HOW_TO_INSTALL,
    LIBRARY_PREFIX,
    cuda_root,
    cutlass_includes,
    find_nvcc,
    nvcc_version,
)

BUILD, ARCHS = "MEGATRON_EXT_BUILD_CUDA", "MEGATRON_EXT_CUDA_ARCHS"
DEFAULT_ARCHS = "90a;100a;120a"
MODULE = f"megatron_ext.precision.{LIBRARY_PREFIX}"
COMMAND = f"{BUILD}=1 pip install --no-build-isolation -e ."


@dataclass(frozen=True, slots=True)
class Source:
    """A CUDA file: what it can be compiled for, and its own flags."""

    file: str
    archs: tuple[str, ...]
    flags: tuple[str, ...]


def is_asked_for(environment: Mapping[str, str]) -> bool:
    """SystemExit where the variable is neither yes nor no."""
    value = environment.get(BUILD, "").strip().lower()
    if value in ("", "0", "no", "false", "off"):
        return False
    if value in ("1", "yes", "true", "on"):
        return True
    raise SystemExit(f"{BUILD}={value!r}: 1 builds the CUDA kernels, 0 does not")


def asked_archs(environment: Mapping[str, str]) -> list[str]:
    """As in ["90a", "100a"]. SystemExit where one is no such number."""
    text = environment.get(ARCHS, "") or DEFAULT_ARCHS
    archs = [arch.strip().removeprefix("sm_") for arch in text.replace(",", ";").split(";")]
    for arch in archs:
        if not arch.rstrip("af").isdigit() or len(arch.rstrip("af")) + 1 < len(arch):
            raise SystemExit(
                f"{ARCHS}={text!r}: {arch!r} is none; write for example {DEFAULT_ARCHS}"
            )
    return archs


def cuda_sources(table: Path = ROOT / "csrc" / "targets.toml") -> list[Source]:
    sources = tomllib.loads(table.read_text(encoding="utf-8"))["source"]
    return [
        Source(source["file"], tuple(source["archs"]), tuple(source.get("flags", ())))
        for source in sources
    ]


def chosen_archs(source: Source, asked: list[str]) -> list[str]:
    """Those asked for that belong to a generation that the file is written for.

    Where none does, the first of its own: launchers must be there even if the device is not.
    """
    generations = {_generation(arch) for arch in source.archs}
    return [arch for arch in asked if _generation(arch) in generations] or [source.archs[0]]


def nvcc_command(
    nvcc: Path, source: Source, archs: list[str], output: Path, includes: list[Path]
) -> list[str]:
    command = [str(nvcc), "-c", "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command += [f"-I{folder}" for folder in (ROOT / "csrc", *includes)]
    return [*command, *source.flags, str(ROOT / source.file), "-o", str(output)]


def what_is_missing(nvcc: Path | None, torch_cuda: str | None, has_torch: bool) -> str | None:
    """Why the kernels cannot be built, with what would work.

    Args:
        torch_cuda: version of CUDA that torch was built with.
    """
    if not has_torch:
        return f"torch is not to be seen here: install it first, then {COMMAND}"
    if torch_cuda is None:
        return "this torch was built without CUDA: install a CUDA build of it (pytorch.org)"
    if nvcc is None:
        return f"there is no nvcc: {HOW_TO_INSTALL}"
    version = nvcc_version(nvcc)
    if version is None or version.partition(".")[0] != torch_cuda.partition(".")[0]:
        return f"{nvcc} is of CUDA {version}, torch of {torch_cuda}: they must agree before the dot"
    return None


def cuda_arguments(environment: Mapping[str, str]) -> dict[str, Any]:
    """What `setup` is given besides; nothing where nobody asks for kernels."""
    if not is_asked_for(environment):
        return {}
    archs = asked_archs(environment)
    try:
        import torch
    except ModuleNotFoundError:
        torch = None
    nvcc = find_nvcc(environment)
    torch_cuda = None if torch is None else torch.version.cuda
    if reason := what_is_missing(nvcc, torch_cuda, torch is not None):
        raise SystemExit(f"{BUILD}=1 asks for the CUDA kernels, but {reason}")
    if not cutlass_includes():
        raise SystemExit(
            f"{BUILD}=1 asks for the CUDA kernels, but CUTLASS's headers are not there: "
            "pip install nvidia-cutlass"
        )
    from torch.utils import cpp_extension

    class BuildCuda(cpp_extension.BuildExtension):  # type: ignore[misc]
        """nvcc for the files of the table, each for its own devices, then torch's own way."""

        def build_extension(self, extension: Any) -> None:
            extension.extra_objects += compile_all(nvcc, archs, Path(self.build_temp))
            super().build_extension(extension)

    root = cuda_root(nvcc)
    extension = cpp_extension.CppExtension(
        MODULE,
        ["csrc/bindings.cpp"],
        include_dirs=[str(ROOT / "csrc"), str(root / "include")],
        libraries=["c10_cuda", "torch_cuda"],
        extra_objects=[str(cuda_runtime(root))],
        extra_compile_args=["-O2"],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildCuda.with_options(use_ninja=False)},
    }


def compile_all(nvcc: Path, archs: list[str], folder: Path) -> list[str]:
    """Object files of all sources, as many at a time as there are cores (MAX_JOBS: fewer).

    SystemExit with the compiler's message. CUTLASS takes minutes and gigabytes a file.
    """
    jobs = [
        (source, chosen_archs(source, archs), folder / f"{source.file.replace('/', '_')}.o")
        for source in cuda_sources()
    ]
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(job: tuple[Source, list[str], Path]) -> str:
        source, chosen, output = job
        print(f"nvcc {source.file} for {', '.join(chosen)}", flush=True)
        done = subprocess.run(
            nvcc_command(nvcc, source, chosen, output, cutlass_includes()),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"nvcc failed on {source.file}:\n{done.stderr[-4000:]}")
        return str(output)

    with ThreadPoolExecutor(num_jobs(os.environ)) as pool:
        return list(pool.map(compile_one, jobs))


def num_jobs(environment: Mapping[str, str]) -> int:
    """SystemExit where MAX_JOBS, torch's own variable for this, is no positive number."""
    text = environment.get("MAX_JOBS", "") or str(os.cpu_count() or 1)
    if not text.isdigit() or int(text) < 1:
        raise SystemExit(f"MAX_JOBS={text!r}: how many compilers run at once, 1 or more")
    return int(text)


def cuda_runtime(root: Path) -> Path:
    """libcudart, the one that torch uses too. SystemExit where it is not there."""
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if found := sorted((root / folder).glob("libcudart.so*")):
            return found[0]
    raise SystemExit(f"there is no libcudart.so below {root}: {HOW_TO_INSTALL}")


def _generation(arch: str) -> int:
    """9, 10, 12: devices of one generation share their special instructions."""
    return int(arch.rstrip("af")) // 10


if __name__ == "__main__":
    setup(**cuda_arguments(os.environ))
