"""Sums of chosen rows: of each output's own list.

    out[i] = sum over s in starts[i] .. starts[i + 1] of  weights[s] rows[chosen[s]]

added up in float32 at least, in the order of the list, and rounded once. Lists may be empty, so a
token none of whose choices leads anywhere gets 0. Each output is made by reading: no two writers
meet, the result has a fixed order. It is the transpose of a gather, and what brings a token's
copies together again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from parallel.device import has_triton


def segment_sum(
    rows: Tensor, chosen: Tensor, starts: Tensor, weights: Tensor | None = None
) -> Tensor:
    """No gradient is made.

    Args:
        rows: [num_rows, width].
        chosen: int64 [num_chosen], numbers of rows, list after list.
        starts: int64 [num_outputs + 1], where each list starts in `chosen`; last its length.
        weights: [num_chosen]; by default all are 1.

    Returns:
        [num_outputs, width] in the dtype of `rows`.
    """
    with torch.no_grad():
        if runs_triton(rows):
            from moe.permutation_triton import segment_sum_triton

            return segment_sum_triton(rows, chosen, starts, weights)
        if not chosen.numel():
            return rows.new_zeros(starts.numel() - 1, rows.shape[1])
        # The kernel wants weights of the rows' dtype: 8 bits of a bfloat16 weight are too few.
        is_narrow = weights is not None and weights.dtype != rows.dtype
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32)) if is_narrow else rows
        total = functional.embedding_bag(
            chosen,
            wide,
            starts,
            mode="sum",
            include_last_offset=True,
            per_sample_weights=None if weights is None else weights.to(wide.dtype),
        )
        return total.to(rows.dtype)


def runs_triton(rows: Tensor) -> bool:
    """Whether Triton's kernels take these rows: on a GPU, and added up in float32."""
    return rows.is_cuda and rows.dtype != torch.float64 and has_triton()
