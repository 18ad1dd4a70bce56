"""Attention of one document, or of queries over other keys, by torch's flash kernel for the CPU.

The kernel takes [batch, heads, length, head_dim] with any strides but the last. Key/value groups
go in as the batch and the query heads of a group as heads whose keys have stride 0, so grouped
queries read shared keys without a copy; the gradients come back one per query head and are
summed.

Its causal mask is aligned with the first query and the first key, so it fits only where queries
and keys are the same tokens. Its derivative reads output and log-sum-exp from outside: given those
over more keys than it sees, it returns the share of the keys that it sees.
"""

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_block(
    query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of some queries over some keys.

    query: [num_queries, num_heads, head_dim]; key, value: [num_keys, num_query_groups, head_dim].
    Returns output [num_query_groups, heads_per_group, num_queries, head_dim] and log-sum-exp
    [num_query_groups, heads_per_group, num_queries] in float32 (float64 for float64).
    """
    num_groups = key.shape[1]
    heads_per_group = query.shape[1] // num_groups
    return _forward(  # type: ignore[no-any-return]
        by_group(query, num_groups),
        _shared(key, heads_per_group),
        _shared(value, heads_per_group),
        0.0,
        is_causal,
        scale=softmax_scale,
    )


def flash_block_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    *,
    softmax_scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """These keys' share of the gradients; output: as query, log_sum_exp: as `flash_block` gives it.

    Returns the gradients of query [num_query_groups, heads_per_group, num_queries, head_dim] and of
    key and value [num_keys, num_query_groups, head_dim].
    """
    num_groups = key.shape[1]
    heads_per_group = query.shape[1] // num_groups
    grad_query, grad_key, grad_value = _backward(
        by_group(grad_output, num_groups),
        by_group(query, num_groups),
        _shared(key, heads_per_group),
        _shared(value, heads_per_group),
        by_group(output, num_groups),
        log_sum_exp,
        0.0,
        is_causal,
        scale=softmax_scale,
    )
    return grad_query, grad_key.sum(dim=1).transpose(0, 1), grad_value.sum(dim=1).transpose(0, 1)


def cpu_flash_forward(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float
) -> Tensor:
    """Write one document's attention into `output`.

    output, query: [length, num_heads, head_dim]; key, value: [length, num_query_groups, head_dim].
    Returns the log-sum-exp that `cpu_flash_backward` needs,
    [num_query_groups, heads_per_group, length] in float32.
    """
    result, log_sum_exp = flash_block(
        query, key, value, softmax_scale=softmax_scale, is_causal=True
    )
    by_group(output, key.shape[1]).copy_(result)
    return log_sum_exp


def cpu_flash_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    output: Tensor,
    log_sum_exp: Tensor,
    softmax_scale: float,
) -> None:
    """Write the gradients of one document's query, key and value into `grads`."""
    grad_query, grad_key, grad_value = flash_block_backward(
        grad_output,
        query,
        key,
        value,
        output,
        log_sum_exp,
        softmax_scale=softmax_scale,
        is_causal=True,
    )
    by_group(grads[0], key.shape[1]).copy_(grad_query)
    grads[1].copy_(grad_key)
    grads[2].copy_(grad_value)


def by_group(x: Tensor, num_groups: int) -> Tensor:
    """View [length, num_heads, head_dim] as [num_groups, heads_per_group, length, head_dim]."""
    length, num_heads, head_dim = x.shape
    return x.view(length, num_groups, num_heads // num_groups, head_dim).permute(1, 2, 0, 3)


def _shared(x: Tensor, heads_per_group: int) -> Tensor:
    """View [length, num_groups, head_dim] as [num_groups, heads_per_group, length, head_dim]."""
    return x.permute(1, 0, 2).unsqueeze(1).expand(-1, heads_per_group, -1, -1)
