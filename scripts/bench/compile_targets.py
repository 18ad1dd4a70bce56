"""Compiles every kernel of the tree for every GPU it is meant for, none of which has to be here.

    python scripts/bench/compile_targets.py [--jobs 4] [--only gemm] [--target sm_90] [--json FILE]

Triton kernels: each `*_triton.py` has a function `kernel_cases()` (`parallel/kernel_case.py`) that
says with which types, constants and options a kernel is launched, and which instructions must be in
its machine code on cuda 90, 100 and 120 and on hip gfx90a, gfx942 and gfx950. CUDA files: those in
`csrc/targets.toml`, compiled with nvcc (`scripts/bench/cuda_sources.py` has the table's format).

Fails (exit code 1) where something does not compile, an expected instruction is not in the machine
code, a kernel has no case for a target, or nvcc is not there and `--no-cuda` was not given. Prints
instructions found, registers, shared memory and spilled bytes. Triton and this command keep what
was compiled by a key of its source: a second run is quick.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench.compiled import Compiled
from scripts.bench.cuda_sources import CudaJob, cuda_jobs, find_nvcc
from scripts.bench.triton_sources import TritonJob, triton_jobs, triton_modules, uncovered

Job = TritonJob | CudaJob


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    began = time.perf_counter()
    problems: list[str] = []
    jobs: list[Job] = []
    if not options.no_triton:
        found, wrong = _triton_part(options.only)
        jobs += found
        problems += wrong
    if not options.no_cuda:
        found, wrong = _cuda_part(options.cache)
        jobs += found
        problems += wrong
    jobs = [job for job in jobs if options.only in job.label and _is_for(job, options.target)]
    if not jobs and not problems:
        problems.append(f"nothing to compile: --only {options.only!r} --target {options.target}")
    results = sorted(
        _run_all(jobs, options.jobs), key=lambda result: (result.kernel, result.target)
    )
    print(table(results), flush=True)
    problems += [f"{r.kernel} for {r.target} {r.problem()}" for r in results if r.problem()]
    seconds = time.perf_counter() - began
    if options.json:
        tree = {
            "seconds": seconds,
            "problems": problems,
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    print(f"{len(results)} compiled, {len(problems)} problems, {seconds:.0f} s")
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


def table(results: Sequence[Compiled]) -> str:
    """A line for each kernel and target."""
    width = max((len(result.kernel) for result in results), default=6)
    lines = [
        f"{'kernel':<{width}} {'target':<8} {'registers':>9} {'shared':>7} {'spilled':>7} "
        f"{'seconds':>7}  instructions"
    ]
    lines += [
        f"{result.kernel:<{width}} {result.target:<8} {result.num_registers:>9} "
        f"{result.shared_bytes:>7} {result.spilled_bytes:>7} {result.seconds:>7.1f}  "
        + ("FAILED" if result.problem() else ", ".join(result.found))
        for result in results
    ]
    return "\n".join(lines)


def _triton_part(only: str) -> tuple[list[Job], list[str]]:
    """What is to be compiled with Triton, and what is wrong already."""
    if importlib.util.find_spec("triton") is None:
        return [], ["triton is not installed: pip install triton (or say --no-triton)"]
    names = list(triton_modules())
    try:
        without_case = [problem for problem in uncovered(names) if only in problem]
        return [job for name in names for job in triton_jobs(name)], without_case
    except Exception as error:
        return [], [f"a file with Triton kernels cannot be asked: {type(error).__name__}: {error}"]


def _cuda_part(cache: Path) -> tuple[list[Job], list[str]]:
    """Likewise with nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        return [], ["nvcc is not there: install CUDA (or say --no-cuda)"]
    try:
        return list(cuda_jobs(nvcc, cache)), []
    except ValueError as error:
        return [], [str(error)]


def _is_for(job: Job, targets: Sequence[str] | None) -> bool:
    """`sm_90` also stands for `sm_90a`."""
    return not targets or job.target in targets or job.target.rstrip("af") in targets


def _run_all(jobs: Sequence[Job], num_processes: int) -> Iterator[Compiled]:
    if not jobs:
        return
    # Triton starts threads, so processes are not forked from this one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, len(jobs)), mp_context=context) as pool:
        futures = {pool.submit(_run, job): job for job in jobs}
        for count, future in enumerate(as_completed(futures), start=1):
            job = futures[future]
            print(f"[{count}/{len(jobs)}] {job.label} {job.target}", file=sys.stderr, flush=True)
            # What kills a process is reported by whoever waits for it.
            error = future.exception()
            yield (
                future.result()
                if error is None
                else Compiled(job.label, job.target, error=f"{type(error).__name__}: {error}")
            )


def _run(job: Job) -> Compiled:
    return job.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--target", action="append", help="sm_90, gfx90a, ...; may be repeated")
    parser.add_argument("--no-cuda", action="store_true", help="leave out what nvcc compiles")
    parser.add_argument("--no-triton", action="store_true", help="leave out Triton's kernels")
    parser.add_argument("--cache", type=Path, default=cache / "megatron-ext" / "compiled")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
