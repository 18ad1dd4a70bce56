"""Merging partial attentions: the reference, and the Triton kernel interpreted and compiled.

Triton decides when it is imported whether it interprets, so that part runs in a process of its own
(this file as a program).
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from parallel.attention.merge import merge_partial
from tests.parallel.attention.merge_case import CASES, MergeCase, check_merge

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_parts_become_the_whole(case: MergeCase) -> None:
    check_merge(merge_partial, case)


def test_float64_stays_float64() -> None:
    check_merge(merge_partial, MergeCase(6, 5, 4, part_dtype=torch.float64), torch.float64)


@needs_triton
def test_interpreted_kernel_equals_the_definition() -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == f"{len(CASES)} cases"


def check_interpreted() -> None:
    from parallel.attention.merge_triton import merge_partial_triton

    for case in CASES:
        check_merge(merge_partial_triton, case)


@needs_triton
@pytest.mark.parametrize(
    ("backend", "architecture", "warp_size", "text", "vectors"),
    [
        ("cuda", 90, 32, "ptx", ("ld.global.v4.b32", "st.global.v4.b32")),
        ("hip", "gfx90a", 64, "amdgcn", ("global_load_dwordx4", "global_store_dwordx4")),
    ],
)
def test_kernel_compiles_ahead_of_time(
    backend: str,
    architecture: Any,
    warp_size: int,
    text: str,
    vectors: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For GPUs that are not here; the accumulated output travels in vectors."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from parallel.attention.merge_triton import merge_kernel

    types = {
        **dict.fromkeys(("output", "log_sum_exp", "part_log_sum_exp"), "*fp32"),
        **{"part_output": "*bf16", "rows": "*i32"},
        **dict.fromkeys(("HAS_ROWS", "HEADS", "CHANNELS"), "constexpr"),
    }
    names = merge_kernel.arg_names
    source = ASTSource(
        merge_kernel,
        {name: types.get(name, "i32") for name in names},
        constexprs={"HAS_ROWS": True, "HEADS": 16, "CHANNELS": 128},
        # Pointers and strides are multiples of 16, as with real heads.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types.get(name) != "constexpr"
        },
    )
    target = GPUTarget(backend, architecture, warp_size)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    for operation in vectors:
        assert operation in compiled.asm[text]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_parts_become_the_whole_on_a_gpu(case: MergeCase) -> None:
    def on_gpu(*tensors: torch.Tensor, rows: torch.Tensor | None) -> None:
        moved = [x.cuda() for x in tensors]
        merge_partial(*moved, rows=None if rows is None else rows.cuda())
        for mine, theirs in zip(tensors[:2], moved, strict=False):
            mine.copy_(theirs)

    check_merge(on_gpu, case)


if __name__ == "__main__":
    check_interpreted()
    print(f"{len(CASES)} cases")
