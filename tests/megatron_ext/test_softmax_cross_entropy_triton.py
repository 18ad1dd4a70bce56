"""The Triton kernels of softmax cross entropy: interpreted on the CPU, and compiled for GPUs.

Triton decides when it is imported whether it interprets, so that part runs in a process of its own
(this file as a program).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.megatron_ext.test_linear_cross_entropy import Case, check_case

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

# The interpreter takes a millisecond an operation. 9,000 columns are more than one block.
CASES = (
    Case("one token", 1),
    Case("odd", 7, vocab_size=250, max_chunk_tokens=3, z_loss_coeff=1e-2, weights="any"),
    Case("one id", 2, vocab_size=1),
    Case("several blocks", 5, vocab_size=9_000, weights="mask"),
    Case("a sure answer", 4, vocab_size=64, scale=60.0),
    Case("large logits", 4, vocab_size=64, offset=1000.0, z_loss_coeff=1e-6),
)


def check_columns_of_another_rank() -> None:
    """Labels below and beyond the columns: no target, and no 1 is taken off the softmax."""
    from megatron_ext.softmax_cross_entropy_triton import gradient_, row_sums

    logits = torch.randn(3, 10)
    labels = torch.tensor([-1, 4, 10])
    maximum, exp_sum, target = row_sums(logits, labels)
    assert torch.equal(maximum, logits.amax(dim=1))
    exponentials = torch.exp(logits - maximum[:, None])
    torch.testing.assert_close(exp_sum, exponentials.sum(dim=1))
    assert target.tolist() == [0.0, float(logits[1, 4]), 0.0]
    scale, weights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 7.0, 11.0])
    expected = exponentials * scale[:, None]
    expected[1, 4] -= 7.0
    gradient_(logits, labels, maximum=maximum, scale=scale, token_weights=weights)
    torch.testing.assert_close(logits, expected)


def check_interpreted() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    check_columns_of_another_rank()
    for case in CASES:
        check_case(case, torch.float32, group, kernel="triton")
        check_case(case, torch.bfloat16, group, kernel="triton")
    dist.destroy_process_group()


@needs_triton
def test_interpreted_kernels_equal_the_definition() -> None:
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


# (backend, architecture, threads of a warp, text form, how it loads and stores 16 bytes at once)
TARGETS = [
    ("cuda", 90, 32, "ptx", ("ld.global.v4.b32", "st.global.v4.b32")),
    ("hip", "gfx90a", 64, "amdgcn", ("global_load_dwordx4", "global_store_dwordx4")),
]


@needs_triton
@pytest.mark.parametrize(("backend", "architecture", "warp_size", "text", "vectors"), TARGETS)
def test_kernels_compile_ahead_of_time(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    architecture: int | str,
    warp_size: int,
    text: str,
    vectors: tuple[str, str],
) -> None:
    """For GPUs that are not here; bfloat16 logits travel in vectors."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_ext import softmax_cross_entropy_triton as kernels

    target = GPUTarget(backend, architecture, warp_size)
    types = {
        **dict.fromkeys(("maxima", "exp_sums", "targets", "scales", "token_weights"), "*fp32"),
        **{"logits": "*bf16", "labels": "*i64", "vocab_size": "i32", "row_stride": "i32"},
        "BLOCK": "constexpr",
    }
    for kernel, operations in (
        (kernels.row_sums_kernel, vectors[:1]),
        (kernels.gradient_kernel, vectors),
    ):
        source = ASTSource(
            kernel,
            {name: types[name] for name in kernel.arg_names},
            constexprs={"BLOCK": 8192},
            # Pointers and sizes are multiples of 16, as with real vocabularies.
            attrs={(i,): [["tt.divisibility", 16]] for i in range(len(kernel.arg_names) - 1)},
        )
        compiled = triton.compile(source, target=target, options={"num_warps": 16})
        for operation in operations:
            assert operation in compiled.asm[text], f"{kernel.__name__} for {architecture}"


if __name__ == "__main__":
    check_interpreted()
    print(f"{len(CASES)} cases")
