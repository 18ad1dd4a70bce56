"""Every Triton kernel compiled for two GPUs that are not here; what the command refuses."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from parallel.kernel_case import CUDA_TARGETS, TARGETS, KernelCase, on_all_targets
from scripts.bench import cuda_sources
from scripts.bench.compile_targets import main
from scripts.bench.compiled import Compiled, found_and_missing
from scripts.bench.cuda_sources import CudaJob, cuda_jobs, find_nvcc, resources
from scripts.bench.triton_sources import (
    TritonJob,
    module_cases,
    triton_jobs,
    triton_modules,
    uncovered,
)
from tests.triton_process import needs_triton

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

# All targets and cases: scripts/bench/compile_targets.py.
SOME_TARGETS = ("sm_90", "gfx90a")

PTXAS_LISTING = """
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 4096 bytes smem
ptxas info    : Function properties for _Z1bPf
    96 bytes stack frame, 88 bytes spill stores, 92 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""

# A kernel, what it calls, and one that its file forgets.
KERNEL = """
import triton
import triton.language as tl

from parallel.kernel_case import KernelCase, on_all_targets


@triton.jit
def plus_one(value):
    return value + 1.0


@triton.jit
def add_kernel(numbers, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(numbers + place, plus_one(tl.load(numbers + place)))


@triton.jit
def forgotten_kernel(numbers):
    tl.store(numbers, 0.0)


def kernel_cases():
    expects = on_all_targets(ptx=("add.f32",), amdgcn=("v_add_f32",), gfx90a=("v_mfma",))
    del expects["sm_120"]
    return (
        KernelCase(
            kernel=add_kernel,
            signature={"numbers": "*fp32"},
            constants={"BLOCK": 128},
            expects=expects,
            forbids={"sm_100": ("st.global",)},
        ),
    )
"""


def first_cases(name: str) -> list[TritonJob]:
    """Of each kernel of a file, for `SOME_TARGETS`."""
    cases = module_cases(name)
    kernels = [case.kernel for case in cases]
    first = {kernels.index(kernel) for kernel in kernels}
    return [job for job in triton_jobs(name) if job.place in first and job.target in SOME_TARGETS]


@needs_triton
@pytest.mark.parametrize("name", list(triton_modules()))
def test_kernels_compile_for_gpus_that_are_not_here(name: str) -> None:
    for job in first_cases(name):
        result = job.run()
        assert not result.problem(), f"{job.label} for {job.target} {result.problem()}"
        assert result.num_registers > 0


@needs_triton
def test_all_kernels_have_cases_for_all_targets() -> None:
    names = list(triton_modules())
    assert "parallel.attention.merge_triton" in names
    assert uncovered(names) == []
    for name in names:
        for case in module_cases(name):
            assert all(case.expects.values()), f"{case.label} expects nothing"
            given = set(case.signature) | set(case.constants)
            assert given == set(case.kernel.arg_names), case.label


@needs_triton
def test_what_is_not_as_expected_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "added_triton.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    by_target = {job.target: job.run() for job in triton_jobs("added_triton")}
    assert by_target["sm_90"].found == ("add.f32",)
    assert by_target["gfx942"].problem() == ""
    assert by_target["gfx90a"].problem() == "has no v_mfma"
    assert by_target["sm_100"].problem() == "has st.global"
    targets = ", ".join(target.name for target in TARGETS)
    assert uncovered(["added_triton"]) == [
        "added_triton.add_kernel: kernel_cases() has no case for sm_120",
        f"added_triton.forgotten_kernel: kernel_cases() has no case for {targets}",
    ]
    added = importlib.import_module("added_triton")
    wrong = KernelCase(added.add_kernel, {"numbers": "*fp32"}, {"BLOCK": 100}, {"sm_90": ()})
    monkeypatch.setattr(added, "kernel_cases", lambda: (wrong,))
    (job,) = triton_jobs("added_triton")
    assert "power of 2" in job.run().error
    del sys.modules["added_triton"]


@needs_triton
def test_the_command_prints_and_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "compiled.json"
    chosen = ["--only", "merge_kernel", "--target", "sm_90", "--target", "gfx942"]
    code = main([*chosen, "--no-cuda", "--jobs", "1", "--json", str(path)])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "[2/2] parallel.attention.merge_triton.merge_kernel" in err
    tree = json.loads(path.read_text())
    assert tree["problems"] == []
    assert [result["target"] for result in tree["results"]] == ["gfx942", "sm_90"]
    for result in tree["results"]:
        assert result["kernel"] in out
        assert result["num_registers"] > 0
        assert result["shared_bytes"] > 0
        assert result["found"]


def test_nothing_to_compile_and_no_nvcc_are_failures(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--no-cuda", "--no-triton"]) == 1
    assert "nothing to compile" in capfd.readouterr().err
    monkeypatch.setattr("scripts.bench.compile_targets.find_nvcc", lambda: None)
    assert main(["--no-triton", "--only", "gemm"]) == 1
    assert "FAILED nvcc is not there" in capfd.readouterr().err


def test_expected_strings_may_stand_in_any_text() -> None:
    assert found_and_missing(["a", "b", "x"], ["cab", "d b"]) == (("a", "b"), ("x",))
    assert Compiled("k", "sm_90", missing=("x", "y"), forbidden=("z",)).problem() == (
        "has no x, y and has z"
    )
    assert Compiled("k", "sm_90", missing=("x",), error="bad").problem() == "does not compile: bad"
    special = on_all_targets(ptx=("p",), amdgcn=("a",), sm_90=("q",))
    assert [special[target.name] for target in CUDA_TARGETS] == [("q",), ("p",), ("p",)]


def test_figures_of_several_cuda_kernels_are_the_largest() -> None:
    assert resources(PTXAS_LISTING) == {
        "num_registers": 168,
        "shared_bytes": 4096,
        "spilled_bytes": 88,
    }


def write_cuda(folder: Path, expect: str) -> Path:
    """A CUDA file beside its table; its expected instruction for sm_90a."""
    csrc = folder / "csrc"
    csrc.mkdir(exist_ok=True)
    (csrc / "twice.cu").write_text(
        "__global__ void twice(float* x) { x[threadIdx.x] = x[threadIdx.x] * 2.5f + 1.0f; }\n"
    )
    table = csrc / "targets.toml"
    table.write_text(
        '[[source]]\nfile = "csrc/twice.cu"\narchs = ["90a"]\nflags = ["-fmad=false"]\n'
        f'expect = {{sm_90a = ["{expect}"]}}\n'
    )
    return table


def test_cuda_files_without_a_target_are_an_error(tmp_path: Path) -> None:
    table = write_cuda(tmp_path, "FMUL")
    (job,) = cuda_jobs("nvcc", tmp_path, table)
    assert (job.label, job.target, job.expected) == ("csrc/twice.cu", "sm_90a", ("FMUL",))
    (tmp_path / "csrc" / "forgotten.cu").write_text("")
    with pytest.raises(ValueError, match=r"differ in \['csrc/forgotten.cu'\]"):
        cuda_jobs("nvcc", tmp_path, table)


@needs_nvcc
@needs_triton
@pytest.mark.parametrize(("expect", "problem"), [("FMUL", ""), ("FFMA", "has no FFMA")])
def test_cuda_files_are_compiled_once(
    expect: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without contraction there is a product and a sum, and no fused one."""
    nvcc = find_nvcc()
    assert nvcc is not None
    table = write_cuda(tmp_path, expect)
    monkeypatch.setattr(cuda_sources, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_sources, "CSRC", tmp_path / "csrc")
    (job,) = cuda_jobs(nvcc, tmp_path / "cache", table)
    result = job.run()
    assert result.problem() == problem
    assert result.num_registers > 0
    monkeypatch.setattr(CudaJob, "_compile", lambda self, folder: Compiled("again", ""))
    again = job.run()
    # What fails is compiled again; what was good is read.
    assert again.kernel == ("again" if problem else "csrc/twice.cu")
    (tmp_path / "csrc" / "twice.cu").write_text("__global__ void other() {}\n")
    assert job.run().kernel == "again"


def test_wrong_cuda_files_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    table = write_cuda(tmp_path, "FMUL")
    (tmp_path / "csrc" / "twice.cu").write_text("#include <cutlass/cutlass.h>\n")
    monkeypatch.setattr(cuda_sources, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_sources, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(cuda_sources, "cutlass_includes", lambda: ())
    (job,) = cuda_jobs(nvcc, tmp_path / "cache", table)
    assert "pip install nvidia-cutlass" in job.run().error
