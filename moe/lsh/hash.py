"""Cross-polytope hashing: rows that point the same way get the same code.

    p    = R x                  R: hash_dim random orthonormal directions, few beside hidden_size
    i    = argmax_i |p_i|       the nearest of the 2 hash_dim corners +-e_i
    h(x) = i + hash_dim [p_i < 0]
    code = sum_k h_k(x) (2 hash_dim)^k      over num_hashes hash functions

Two rows share a bucket only if all their hashes agree, so more functions or more directions make
more and smaller buckets (LSH-MoE, arXiv 2411.08446, section 3.2; it leaves open how codes are put
together and how wide R is: in full width nearly every row would stay alone). Length does not
matter, only direction. A hash is a step function and has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.lsh.buckets import num_buckets
from parallel.device import has_triton


def draw_rotations(hidden_size: int, *, num_hashes: int, hash_dim: int, seed: int) -> Tensor:
    """Random directions, orthonormal within a hash, and all of them where there is room.

    Returns:
        float32 [num_hashes, hash_dim, hidden_size] on the CPU, the same for one seed everywhere.

    Raises:
        ValueError: `hash_dim` is more than `hidden_size`, or there are too many buckets.
    """
    if hash_dim > hidden_size:
        raise ValueError(f"no {hash_dim} orthogonal directions among {hidden_size}")
    num_buckets(num_hashes, hash_dim)
    generator = torch.Generator().manual_seed(seed)
    together = num_hashes if num_hashes * hash_dim <= hidden_size else 1
    blocks = []
    for _ in range(num_hashes // together):
        gaussian = torch.randn(
            hidden_size, together * hash_dim, generator=generator, dtype=torch.float64
        )
        blocks.append(torch.linalg.qr(gaussian).Q.T)
    return torch.cat(blocks).view(num_hashes, hash_dim, hidden_size).float()


@torch.no_grad()
def hash_rows(rows: Tensor, rotations: Tensor) -> Tensor:
    """The code of each row.

    Args:
        rows: [num_rows, hidden_size].
        rotations: [num_hashes, hash_dim, hidden_size] in the dtype of `rows`; products are added up
            in float32 at least.

    Returns:
        int64 [num_rows], in 0 .. (2 hash_dim)^num_hashes - 1.
    """
    if rows.is_cuda and rows.dtype != torch.float64 and has_triton():
        from moe.lsh.hash_triton import hash_rows_triton

        return hash_rows_triton(rows, rotations)
    num_hashes, hash_dim, _ = rotations.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    projected = rows.to(wide) @ rotations.flatten(0, 1).to(wide).T
    return codes_of(projected.view(-1, num_hashes, hash_dim))


def codes_of(projected: Tensor) -> Tensor:
    """Codes int64 [num_rows] of R x, [num_rows, num_hashes, hash_dim]."""
    _, num_hashes, hash_dim = projected.shape
    largest = projected.abs().argmax(dim=-1, keepdim=True)
    is_negative = projected.gather(-1, largest) < 0
    digits = (largest + hash_dim * is_negative)[..., 0]
    return (digits * digit_values(num_hashes, hash_dim, digits.device)).sum(dim=-1)


def digit_values(num_hashes: int, hash_dim: int, device: torch.device) -> Tensor:
    """int64 [num_hashes]: (2 hash_dim)^k."""
    return (2 * hash_dim) ** torch.arange(num_hashes, device=device)
