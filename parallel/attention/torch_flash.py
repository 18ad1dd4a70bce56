"""Packed causal attention by the flash kernels that torch itself ships for CUDA and ROCm.

`torch.nn.attention.varlen` wraps the same two operators, but its arguments changed in each of torch
2.10 to 2.12 (grouped-query attention came with 2.12); the operators' leading arguments did not, and
they hand out the log-sum-exp. So this module calls the operators and adds the derivative.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# The CUDA kernels ask for a multiple of 8; zeros there change neither scores nor output.
_HEAD_DIM_MULTIPLE = 8
MAX_HEAD_DIM = 256


def torch_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
) -> Tensor:
    """Packed causal attention; shapes as `varlen_attention`, cu_seqlens int32 on the same device.

    float16 and bfloat16 only. Rows behind cu_seqlens[-1] are not written: their values, and those
    rows of the gradients, are arbitrary.
    """
    head_dim = query.shape[-1]
    padding = -head_dim % _HEAD_DIM_MULTIPLE
    if padding:
        query, key, value = (functional.pad(x, (0, padding)) for x in (query, key, value))
    # At max_seqlen 1 with grouped queries the operator takes a decoding path that has no backward.
    output: Tensor = _TorchFlash.apply(
        query, key, value, cu_seqlens, max(max_seqlen, 2), softmax_scale
    )  # type: ignore[no-untyped-call]
    return output[..., :head_dim]


class _TorchFlash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        softmax_scale: float,
    ) -> Tensor:
        query, key, value = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)
        )
        # Behind max_seqlen: dropout, causal, return the debug mask.
        output, log_sum_exp, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            0.0,
            True,
            False,
            scale=softmax_scale,
        )
        ctx.save_for_backward(query, key, value, output, log_sum_exp, cu_seqlens, rng_state, unused)
        ctx.max_seqlen, ctx.softmax_scale = max_seqlen, softmax_scale
        return output  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp, cu_seqlens, rng_state, unused = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad_output.contiguous(),
            query,
            key,
            value,
            output,
            log_sum_exp,
            cu_seqlens,
            cu_seqlens,
            ctx.max_seqlen,
            ctx.max_seqlen,
            0.0,
            True,
            rng_state,
            unused,
            scale=ctx.softmax_scale,
        )
        return *grads, None, None, None
