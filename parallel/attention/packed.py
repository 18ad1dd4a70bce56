"""The one call for attention over a row that may hold pieces of shared sequences.

Whole documents are computed here alone, as by `varlen_attention`; for a sequence that several
ranks hold, they pass keys and values round (`ring`) or exchange heads (`ulysses`). All ranks of a
ring make the same calls in the same order, forward and backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.attention.attention import check_shapes, varlen_attention
from parallel.attention.block import Attended, BlockKernels
from parallel.attention.block_choice import choose_blocks
from parallel.attention.documents import inner_contiguous
from parallel.attention.heads_pass import SavedHeads
from parallel.attention.local import Backend
from parallel.attention.shared_pass import SharedPass
from parallel.attention.shared_rows import SharedRows
from parallel.comm.exchange import Exchange


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rows: SharedRows,
    exchange: Exchange | None,
    softmax_scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Causal self-attention inside each sequence, wherever its pieces are.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_query_groups, head_dim],
    as for `varlen_attention`; num_tokens is at least rows.num_rows, and what lies behind is
    padding, with output 0 and gradient 0.
    exchange: the way to the other ranks; None where nothing is shared. It counts what is sent.
    softmax_scale: head_dim ** -0.5 where not given.
    backend: a name from `parallel.attention.local`; shared sequences cannot use "sdpa".

    Kept for backward: query, key, value, output and log-sum-exp. Of a ring that exchanges heads
    this rank's heads of its tokens are kept; then, unless another ring goes round, of its rows
    only the output.

    Returns [num_tokens, num_heads, head_dim] in query's dtype. Raises ValueError for shapes that
    do not fit, for a backend that cannot run here, and for a ring that exchanges heads and does not
    divide the number of query groups.
    """
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if not rows.is_shared:
        whole = rows.whole
        on_device = query.is_cuda and query.dtype != torch.float32
        return varlen_attention(
            query,
            key,
            value,
            cu_seqlens=whole.device_cu_seqlens if on_device else whole.cu_seqlens,
            max_seqlen=whole.max_seqlen,
            softmax_scale=scale,
            backend=backend,
            num_document_tokens=whole.num_tokens,
        )
    check_shapes(query, key, value)
    _check(query, key, rows)
    assert exchange is not None, "shared sequences need an exchange"
    kernels = choose_blocks(
        backend,
        device_type=query.device.type,
        dtype=query.dtype,
        head_dim=query.shape[-1],
        softmax_scale=scale,
    )
    query, key, value = (inner_contiguous(x) for x in (query, key, value))
    return _PackedAttention.apply(query, key, value, rows, exchange, kernels)  # type: ignore[no-any-return, no-untyped-call]


def _check(query: Tensor, key: Tensor, rows: SharedRows) -> None:
    if query.shape[0] < rows.num_rows:
        raise ValueError(f"{query.shape[0]} tokens are given, and {rows.num_rows} belong to pieces")
    for ring in rows.ulysses:
        if key.shape[1] % len(ring.ranks):
            raise ValueError(
                f"the {len(ring.ranks)} ranks {ring.ranks} cannot exchange {key.shape[1]} query "
                "groups: their number must divide that of the groups"
            )


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: SharedRows,
        exchange: Exchange,
        kernels: BlockKernels,
    ) -> Tensor:
        shared_pass = SharedPass(rows, exchange, kernels)
        answer = shared_pass.forward(query, key, value)
        heads = [tensor for saved in answer.heads for tensor in saved.tensors()]
        if heads and not rows.own_rows:
            # Backward has these rows' heads. A copy of the others: a view would keep all.
            query, key, value = (x[: rows.num_whole].clone() for x in (query, key, value))
        ctx.save_for_backward(query, key, value, answer.output, answer.log_sum_exp, *heads)
        ctx.shared_pass = shared_pass
        return answer.output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp, *heads = ctx.saved_tensors
        saved = [SavedHeads(*heads[first : first + 5]) for first in range(0, len(heads), 5)]
        attended = Attended(inner_contiguous(grad_output), query, output, log_sum_exp)
        gradients = ctx.shared_pass.backward(attended, key, value, tuple(saved))
        return *gradients, None, None, None
