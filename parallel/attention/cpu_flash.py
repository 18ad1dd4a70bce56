"""Causal attention of one document by torch's own flash kernel for the CPU.

The kernel takes [batch, heads, length, head_dim] with any strides but the last. Key/value groups
go in as the batch and the query heads of a group as heads whose keys have stride 0, so grouped
queries read shared keys without a copy; the gradients come back one per query head and are
summed.
"""

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_flash_forward(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float
) -> Tensor:
    """Write one document's attention into `output`.

    output, query: [length, num_heads, head_dim]; key, value: [length, num_query_groups, head_dim].
    Returns the log-sum-exp that `cpu_flash_backward` needs,
    [num_query_groups, heads_per_group, length] in float32.
    """
    num_groups = key.shape[1]
    heads_per_group = query.shape[1] // num_groups
    result, log_sum_exp = _forward(
        _by_group(query, num_groups),
        _shared(key, heads_per_group),
        _shared(value, heads_per_group),
        0.0,
        True,
        scale=softmax_scale,
    )
    _by_group(output, num_groups).copy_(result)
    return log_sum_exp  # type: ignore[no-any-return]


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
    num_groups = key.shape[1]
    heads_per_group = query.shape[1] // num_groups
    grad_query, *grad_shared = _backward(
        _by_group(grad_output, num_groups),
        _by_group(query, num_groups),
        _shared(key, heads_per_group),
        _shared(value, heads_per_group),
        _by_group(output, num_groups),
        log_sum_exp,
        0.0,
        True,
        scale=softmax_scale,
    )
    _by_group(grads[0], num_groups).copy_(grad_query)
    for target, per_head in zip(grads[1:], grad_shared, strict=True):
        target.copy_(per_head.sum(dim=1).transpose(0, 1))


def _by_group(x: Tensor, num_groups: int) -> Tensor:
    """View [length, num_heads, head_dim] as [num_groups, heads_per_group, length, head_dim]."""
    length, num_heads, head_dim = x.shape
    return x.view(length, num_groups, num_heads // num_groups, head_dim).permute(1, 2, 0, 3)


def _shared(x: Tensor, heads_per_group: int) -> Tensor:
    """View [length, num_groups, head_dim] as [num_groups, heads_per_group, length, head_dim]."""
    return x.permute(1, 0, 2).unsqueeze(1).expand(-1, heads_per_group, -1, -1)
