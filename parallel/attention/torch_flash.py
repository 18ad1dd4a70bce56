"""Packed causal attention by the flash kernels that torch itself ships for CUDA and ROCm.

`torch.nn.attention.varlen` wraps the same two operators, but its arguments changed in each of torch
2.10 to 2.12 (grouped-query attention came with 2.12); the operators' leading arguments did not, and
they hand out the log-sum-exp. So this module calls the operators and adds the derivative.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel.attention.documents import inner_contiguous

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
    query, key, value = (pad_head_dim(x) for x in (query, key, value))
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
        query, key, value = (inner_contiguous(x) for x in (query, key, value))
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
            grad_output,
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


def torch_flash_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    softmax_scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries over packed keys, with log-sum-exps; without a derivative.

    query: [num_queries, num_heads, head_dim]; key, value: [num_keys, num_query_groups, head_dim],
    float16 or bfloat16. cu_seqlens, max_seqlens: of the queries and of the keys; is_causal only
    where both are the same. Returns output as query and log-sum-exp [num_heads, num_queries].
    """
    head_dim = query.shape[-1]
    query, key, value = (pad_head_dim(x) for x in (query, key, value))
    output, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        *cu_seqlens,
        # At 1 with grouped queries the operator takes a decoding path that has no backward.
        max(max_seqlens[0], 2),
        max_seqlens[1],
        0.0,
        is_causal,
        False,
        scale=softmax_scale,
    )
    return output[..., :head_dim], log_sum_exp


def torch_flash_block_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    *,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    softmax_scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """These keys' share of the gradients, from output and log-sum-exp over all keys."""
    head_dim = query.shape[-1]
    # Only channels must lie side by side; keys and values come as every other row of a buffer.
    padded = [pad_head_dim(x) for x in (grad_output, query, key, value, output)]
    grads = torch.ops.aten._flash_attention_backward(
        *padded,
        log_sum_exp.contiguous(),
        *cu_seqlens,
        max(max_seqlens[0], 2),
        max_seqlens[1],
        0.0,
        is_causal,
        *_no_dropout(query.device),
        scale=softmax_scale,
    )
    grad_query, grad_key, grad_value = (grad[..., :head_dim] for grad in grads)
    return grad_query, grad_key, grad_value


def pad_head_dim(x: Tensor) -> Tensor:
    """x [..., head_dim] with zeros behind, to the multiple of channels that the kernels ask for."""
    padding = -x.shape[-1] % _HEAD_DIM_MULTIPLE
    return functional.pad(x, (0, padding)) if padding else x


@cache
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """State of a random generator in the form that backward takes; without dropout unread."""
    if torch.version.hip is not None:
        number = torch.zeros((), dtype=torch.long, device=device)
        return number, number
    dtype = torch.uint64
    return torch.zeros(2, dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device)
