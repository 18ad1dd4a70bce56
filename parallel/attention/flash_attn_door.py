"""The one door to the `flash-attn` library; nothing else imports it.

It is built from source and never required: where it is missing, torch's own flash kernels serve.
"""

import inspect
from functools import cache

import torch
from torch import Tensor

from parallel.attention.torch_flash import pad_head_dim
from parallel.optional_library import Availability, import_library


@cache
def has_flash_attn() -> Availability:
    """Import flash-attn once and say what came of it."""
    return import_library(
        "flash_attn",
        "flash-attn",
        how="pip install flash-attn",
        needs="flash_attn_varlen_func",
        hint="version 2 has",
    )


def flash_attn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
) -> Tensor:
    """Packed causal attention by flash-attn; shapes as `varlen_attention`, cu_seqlens int32.

    Raises RuntimeError with the reason where the library is missing.
    """
    availability = has_flash_attn()
    if not availability:
        raise RuntimeError(availability.reason)
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(  # type: ignore[no-any-return]
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        dropout_p=0.0,
        softmax_scale=softmax_scale,
        causal=True,
    )


@cache
def has_flash_attn_blocks() -> Availability:
    """Whether flash-attn also gives log-sum-exps and takes them in backward, as rings need it."""
    if not has_flash_attn():
        return has_flash_attn()
    try:
        from flash_attn import flash_attn_interface

        parameters = inspect.signature(
            flash_attn_interface._flash_attn_varlen_forward
        ).parameters.keys()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        return Availability(False, f"{has_flash_attn().reason} hides its varlen operators: {error}")
    if "window_size_left" not in parameters:
        return Availability(
            False, f"{has_flash_attn().reason} has older varlen operators; 2.7 has these"
        )
    return has_flash_attn()


def flash_attn_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    softmax_scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """As `torch_flash_block`; needs `has_flash_attn_blocks`."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    head_dim = query.shape[-1]
    output, log_sum_exp, *_ = _flash_attn_varlen_forward(
        *(pad_head_dim(x) for x in (query, key, value)),
        *cu_seqlens,
        *max_seqlens,
        dropout_p=0.0,
        softmax_scale=softmax_scale,
        causal=is_causal,
    )
    return output[..., :head_dim], log_sum_exp


def flash_attn_block_backward(
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
    """As `torch_flash_block_backward`; needs `has_flash_attn_blocks`."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    head_dim = query.shape[-1]
    inputs = [pad_head_dim(x) for x in (grad_output, query, key, value, output)]
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[1:4]]
    _flash_attn_varlen_backward(
        *inputs,
        log_sum_exp.contiguous(),
        *grads,
        *cu_seqlens,
        *max_seqlens,
        dropout_p=0.0,
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    )
    grad_query, grad_key, grad_value = (grad[..., :head_dim] for grad in grads)
    return grad_query, grad_key, grad_value
