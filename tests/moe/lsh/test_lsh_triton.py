"""The Triton kernel of hashing: interpreted on the CPU, and compiled for GPUs.

Triton decides when it is imported whether it interprets, so that part runs in a process of its own
(this file as a program).
"""

from __future__ import annotations

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

from moe.lsh.hash import draw_rotations, hash_rows

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

# num_rows, hidden_size, num_hashes, hash_dim
HASHES = (
    (1, 1, 1, 1),
    (5, 7, 3, 1),
    (16, 64, 6, 4),
    (17, 130, 5, 3),
    (3, 48, 1, 16),
    (2, 96, 10, 5),
)


def check_hash(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    from moe.lsh.hash_triton import hash_rows_triton

    num_rows, hidden_size, num_hashes, hash_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    rows = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    rotations = draw_rotations(hidden_size, num_hashes=num_hashes, hash_dim=hash_dim, seed=1)
    rotations = rotations.to(dtype)
    found = hash_rows_triton(rows.to(device), rotations.to(device)).cpu()
    exact = hash_rows(rows.double(), rotations.double())
    # float32 sums of hidden_size products in another order: beyond their error no code may differ.
    projected = rows.double() @ rotations.flatten(0, 1).double().T
    sizes = projected.abs().view(num_rows, num_hashes, hash_dim).sort(dim=-1).values
    margins = sizes[..., -1] - (sizes[..., -2] if hash_dim > 1 else -sizes[..., -1])
    bound = (
        2 * hidden_size * 2.0**-24 * (rows.double().abs() @ rotations.abs().double().amax((0, 1)))
    )
    is_sure = margins.amin(dim=-1) > bound
    assert is_sure.double().mean() > 0.9, "the case says nothing"
    assert torch.equal(found[is_sure], exact[is_sure])


def check_all(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in HASHES:
            check_hash(shape, dtype, device)


@needs_triton
def test_interpreted_kernel_equals_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "done"


@needs_triton
@pytest.mark.gpu
def test_kernel_equals_the_reference_on_a_gpu() -> None:
    check_all("cuda")


@needs_triton
@pytest.mark.parametrize(
    ("backend", "architecture", "warp_size", "text"),
    [("cuda", 90, 32, "ptx"), ("hip", "gfx90a", 64, "amdgcn")],
)
def test_kernel_compiles_ahead_of_time(
    backend: str, architecture: Any, warp_size: int, text: str
) -> None:
    """For GPUs that are not here; bfloat16 is multiplied by their matrix units."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe.lsh.hash_triton import hash_kernel

    constants = {"ROWS": 16, "CHANNELS": 64, "HASHES": 8, "DIRECTIONS": 4, "IS_WIDENED": False}
    pointers = {"rows": "*bf16", "rotations": "*bf16", "values": "*i64", "codes": "*i64"}
    signature = pointers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        hash_kernel,
        {name: signature.get(name, "i32") for name in hash_kernel.arg_names},
        constexprs=constants,
    )
    compiled = triton.compile(source, target=GPUTarget(backend, architecture, warp_size))
    assert ("mma" if backend == "cuda" else "mfma") in compiled.asm[text]


if __name__ == "__main__":
    check_all("cpu")
    print("done")
