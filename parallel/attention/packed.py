"""The one call for attention over a row that may hold pieces of shared sequences.

Whole documents are computed here alone, as by `varlen_attention`; for a sequence that several
ranks hold, they exchange keys and values (`ring`) or heads (`ulysses`). All ranks of a ring make
the same calls in the same order, forward and backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.attention.attention import varlen_attention
from parallel.attention.block import Attended, BlockKernels
from parallel.attention.block_loop import LoopBlocks
from parallel.attention.local import Backend
from parallel.attention.ring import RingPass
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
    exchange: the way to the other ranks; None where nothing is shared.
    softmax_scale: head_dim ** -0.5 where not given.
    backend: a name from `parallel.attention.local`.

    Returns [num_tokens, num_heads, head_dim] in query's dtype.
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
            num_document_tokens=whole.cu_seqlens[-1],
        )
    assert exchange is not None, "shared sequences need an exchange"
    kernels: BlockKernels = LoopBlocks(
        "reference" if backend == "reference" else "per_document", scale
    )
    output: Tensor = _PackedAttention.apply(query, key, value, rows, exchange, kernels)  # type: ignore[no-untyped-call]
    return output


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
        ring_pass = RingPass(rows, exchange, kernels)
        output, log_sum_exp = ring_pass.forward(query, key, value)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.ring_pass = ring_pass
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        attended = Attended(grad_output, query, output, log_sum_exp)
        gradients = ctx.ring_pass.backward(attended, key, value)
        return *gradients, None, None, None
