"""CUDA files and what they are compiled for: `csrc/targets.toml`, a table for each file.

    [[source]]
    file = "csrc/gemm/fp8.cu"
    archs = ["90a"]
    flags = ["-fmad=false"]         # besides C++17, -O3 and the folders of headers
    expect = {sm_90a = ["HGMMA"]}   # looked for in SASS and in PTX

What was compiled is kept in a folder by a key made of the compiler, the flags and every file of
csrc/, so that a second run only reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_ext import cuda_compiler
from scripts.bench.compiled import Compiled, found_and_missing
from scripts.bench.triton_sources import ROOT

CSRC = ROOT / "csrc"
_TIMEOUT_SECONDS = 1200


@dataclass(frozen=True, slots=True)
class CudaJob:
    """One file for one architecture."""

    nvcc: str
    file: str
    target: str
    flags: tuple[str, ...]
    includes: tuple[str, ...]
    expected: tuple[str, ...]
    cache: str

    @property
    def label(self) -> str:
        return self.file

    def run(self) -> Compiled:
        kept = Path(self.cache) / f"{self._key()}.json"
        if kept.is_file():
            began = time.perf_counter()
            tree = json.loads(kept.read_text(encoding="utf-8"))
            tree |= {"found": tuple(tree["found"]), "seconds": time.perf_counter() - began}
            return Compiled(**tree | {"missing": (), "forbidden": ()})
        with TemporaryDirectory() as folder:
            result = self._compile(Path(folder))
        if not result.problem():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(asdict(result)), encoding="utf-8")
        return result

    def _compile(self, folder: Path) -> Compiled:
        number = self.target.removeprefix("sm_")
        cubin = folder / "out.cubin"
        command = [self.nvcc, "-cubin", "-std=c++17", "-O3", "-Xptxas", "-v"]
        command += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        command += [f"-I{include}" for include in (str(CSRC), *self.includes)]
        # The PTX that it makes on its way is kept.
        command += ["--keep", "--keep-dir", str(folder), *self.flags]
        command += [str(ROOT / self.file), "-o", str(cubin)]
        began = time.perf_counter()
        done = _run(command)
        if done.returncode:
            return Compiled(self.label, self.target, error=_first_error(done.stderr))
        ptx = "".join(path.read_text(errors="replace") for path in folder.glob("*.ptx"))
        sass = _run([_tool(self.nvcc, "cuobjdump"), "-sass", str(cubin)]).stdout
        found, missing = found_and_missing(self.expected, [ptx, sass])
        used = resources(done.stderr + done.stdout)
        return Compiled(
            self.label,
            self.target,
            found=found,
            missing=missing,
            num_registers=used["num_registers"],
            shared_bytes=used["shared_bytes"],
            spilled_bytes=used["spilled_bytes"],
            seconds=time.perf_counter() - began,
        )

    def _key(self) -> str:
        digest = hashlib.sha256(_run([self.nvcc, "--version"]).stdout.encode())
        digest.update(repr((self.file, self.target, self.flags, self.expected)).encode())
        for path in sorted(CSRC.rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(CSRC)).encode() + path.read_bytes())
        return digest.hexdigest()[:32]


def resources(listing: str) -> dict[str, int]:
    """The largest figures of what `ptxas -v` prints about a file's kernels."""

    def largest(pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, listing)), default=0)

    return {
        "num_registers": largest(r"Used (\d+) registers"),
        "shared_bytes": largest(r"(\d+) bytes smem"),
        "spilled_bytes": largest(r"(\d+) bytes spill stores"),
    }


def cuda_jobs(nvcc: str, cache: Path, table: Path = CSRC / "targets.toml") -> list[CudaJob]:
    """Of all files in the table. ValueError: a CUDA file is not in it, or the other way about."""
    sources: list[dict[str, Any]] = tomllib.loads(table.read_text(encoding="utf-8"))["source"]
    root = table.parent.parent
    named = {source["file"] for source in sources}
    there = {str(path.relative_to(root)) for path in table.parent.rglob("*.cu")}
    if named != there:
        raise ValueError(f"{table.name} and the CUDA files differ in {sorted(named ^ there)}")
    return [
        CudaJob(
            nvcc=nvcc,
            file=source["file"],
            target=f"sm_{arch}",
            flags=tuple(source.get("flags", ())),
            includes=cutlass_includes(),
            expected=tuple(source["expect"][f"sm_{arch}"]),
            cache=str(cache),
        )
        for source in sources
        for arch in source["archs"]
    ]


def cutlass_includes() -> tuple[str, ...]:
    """Folders of CUTLASS's headers; none where they are not there."""
    return tuple(map(str, cuda_compiler.cutlass_includes()))


def find_nvcc() -> str | None:
    """On the path, where CUDA is usually installed, or as PyPI has it."""
    found = cuda_compiler.find_nvcc()
    return None if found is None else str(found)


def _tool(nvcc: str, name: str) -> str:
    """Beside nvcc, on the path, or as Triton brings it. ValueError: nowhere."""
    folders = [str(Path(nvcc).resolve().parent), os.environ.get("PATH", "")]
    spec = find_spec("triton")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folders.append(str(Path(place) / "backends" / "nvidia" / "bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise ValueError(f"{name} is not there: it is part of CUDA, and of the package triton")
    return found


def _first_error(listing: str) -> str:
    lines = [line for line in listing.splitlines() if "error" in line or "fatal" in line]
    message = " ".join((lines or listing.splitlines()[-1:] or ["no message"])[0].split())
    if "cutlass/" in message or "cute/" in message:
        message += " (CUTLASS's headers come with pip install nvidia-cutlass)"
    return message[:600]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS
    )
