"""All-to-all of rows with a split for each pair of ranks, and its gradient.

Rank r sends its first `send_splits[0]` rows to rank 0, the next to rank 1, and so on, and receives
`receive_splits[i]` rows from rank i. The gradient goes the same way back: splits exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        send_splits: list[int],
        receive_splits: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.splits, ctx.group = (send_splits, receive_splits), group
        return _exchange(rows, send_splits, receive_splits, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send_splits, receive_splits = ctx.splits
        return _exchange(grad, receive_splits, send_splits, ctx.group), None, None, None


def _exchange(
    rows: Tensor, send_splits: list[int], receive_splits: list[int], group: dist.ProcessGroup
) -> Tensor:
    received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
    dist.all_to_all_single(
        received,
        rows.contiguous(),
        output_split_sizes=receive_splits,
        input_split_sizes=send_splits,
        group=group,
    )
    return received


def all_to_all_rows(
    rows: Tensor,
    *,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: dist.ProcessGroup,
) -> Tensor:
    """Exchange rows; every rank of the group calls this together, forward and backward.

    Args:
        rows: [sum of send_splits, ...], those for rank 0 first.
        send_splits, receive_splits: rows to and from each rank of the group, 0 is fine.

    Returns:
        [sum of receive_splits, ...], those from rank 0 first.
    """
    return _AllToAllRows.apply(rows, list(send_splits), list(receive_splits), group)  # type: ignore[no-any-return, no-untyped-call]


def exchange_counts(counts: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """How many rows come from each rank for each expert that is here.

    Args:
        counts: int64 [num_experts], this rank's rows for each expert of the group.

    Returns:
        int64 [group size, num_local_experts].
    """
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received.view(group.size(), -1)
