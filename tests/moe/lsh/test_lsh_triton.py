"""The Triton kernel of hashing: interpreted on the CPU, and run on a GPU."""

from __future__ import annotations

import pytest
import torch

from moe.lsh.hash import draw_rotations, hash_rows
from tests.triton_process import needs_triton, run_interpreted

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
    assert run_interpreted(__file__).strip() == "done"


@needs_triton
@pytest.mark.gpu
def test_kernel_equals_the_reference_on_a_gpu() -> None:
    check_all("cuda")


if __name__ == "__main__":
    check_all("cpu")
    print("done")
