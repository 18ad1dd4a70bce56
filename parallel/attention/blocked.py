"""Causal attention of one document by blocks of queries, from batched matrix products.

A block of queries sees the keys up to its own end, so the work is the causal triangle in steps of
`QUERY_BLOCK` instead of the whole square, and no more than one block of scores exists at a time.
Backward computes the probabilities again from query and key: nothing is saved but the inputs.

Why it exists beside torch's flash kernel for the CPU: that one computes the whole square for
documents up to 512 tokens and uses small products in its backward. With 4096 tokens of 512-token
documents, 8 heads of 64, one thread of an AMD EPYC (Zen 4, avx512_bf16), forward + backward took
103 ms here and 213 ms there in bfloat16, 153 and 208 ms in float32 (torch 2.13, November 2025).

Scores and probabilities are held in the inputs' precision, as in unfused attention everywhere;
products, softmax and the sums over blocks are float32 inside.

Grouped-query attention costs no copy of keys: the query heads of one group are more rows of the
same product. Row r of a block is (head within group, query), group by group.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

QUERY_BLOCK = 128
# About what stays in cache: 2 MiB of bfloat16 scores.
MAX_SCORES = 1 << 20


def causal_mask(like: Tensor) -> Tensor:
    """[QUERY_BLOCK, QUERY_BLOCK]: 0 on and below the diagonal, -inf above; added to scores."""
    mask = like.new_full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf)
    return mask.triu_(diagonal=1)


def blocked_forward(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float,
    mask: Tensor,
) -> None:
    """Write one document's attention into `output`.

    output, query: [length, num_heads, head_dim]; key, value: [length, num_query_groups, head_dim];
    mask: from `causal_mask`.
    """
    for groups, blocks in _work(query, key):
        keys = key[:, groups].transpose(0, 1).contiguous()
        values = value[:, groups].transpose(0, 1)
        for start, end in blocks:
            rows = _rows(query[start:end], key, groups)
            probabilities = _probabilities(rows, keys, start, end, softmax_scale, mask)
            block = torch.bmm(probabilities, values[:, :end])
            _write_rows(output[start:end], block, key, groups)


def blocked_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float,
    mask: Tensor,
) -> None:
    """Write the gradients of one document's query, key and value into `grads`; shapes as forward.

    With P = softmax(S), dP = dO V^T and dS = P * (dP - rowsum(P * dP)):
    dV = P^T dO, dQ = c dS K, dK = c dS^T Q.
    """
    grad_query, grad_key, grad_value = grads
    accumulate_dtype = torch.promote_types(query.dtype, torch.float32)
    for groups, blocks in _work(query, key):
        keys, values = (x[:, groups].transpose(0, 1).contiguous() for x in (key, value))
        grad_keys = grad_values = None
        # From the last block to the first: the last one sees every key, so its share is where
        # the sums over blocks begin.
        for start, end in reversed(blocks):
            rows = _rows(query[start:end], key, groups)
            grad_rows = _rows(grad_output[start:end], key, groups)
            probabilities = _probabilities(rows, keys, start, end, softmax_scale, mask)
            grad_probabilities = torch.bmm(grad_rows, values[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            )
            block = _scaled_bmm(grad_scores, keys[:, :end], softmax_scale)
            _write_rows(grad_query[start:end], block, key, groups)

            share_of_keys = _scaled_bmm(grad_scores.transpose(1, 2), rows, softmax_scale)
            share_of_values = torch.bmm(probabilities.transpose(1, 2), grad_rows)
            if grad_keys is None or grad_values is None:
                grad_keys = share_of_keys.to(accumulate_dtype)
                grad_values = share_of_values.to(accumulate_dtype)
            else:
                grad_keys[:, :end] += share_of_keys
                grad_values[:, :end] += share_of_values
        assert grad_keys is not None
        assert grad_values is not None
        grad_key[:, groups].copy_(grad_keys.transpose(0, 1))
        grad_value[:, groups].copy_(grad_values.transpose(0, 1))


def _work(query: Tensor, key: Tensor) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """Slices of the key/value groups, each with its blocks of queries, `MAX_SCORES` at a time."""
    length, num_heads, _ = query.shape
    num_groups = key.shape[1]
    scores_per_group = num_heads // num_groups * min(QUERY_BLOCK, length) * length
    step = max(1, MAX_SCORES // scores_per_group)
    blocks = [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]
    for first in range(0, num_groups, step):
        yield slice(first, min(first + step, num_groups)), blocks


def _by_group(x: Tensor, key: Tensor, groups: slice) -> Tensor:
    """View [block, num_heads, head_dim] as [groups, heads_per_group, block, head_dim]."""
    block, num_heads, head_dim = x.shape
    num_groups = key.shape[1]
    split = x.view(block, num_groups, num_heads // num_groups, head_dim)
    return split[:, groups].permute(1, 2, 0, 3)


def _rows(x: Tensor, key: Tensor, groups: slice) -> Tensor:
    """[block, num_heads, head_dim] to [groups, heads_per_group * block, head_dim]."""
    return _by_group(x, key, groups).flatten(1, 2)


def _write_rows(x: Tensor, rows: Tensor, key: Tensor, groups: slice) -> None:
    """The inverse of `_rows`, into x."""
    target = _by_group(x, key, groups)
    target.copy_(rows.view(target.shape))


def _scaled_bmm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right; with beta=0 the first argument of baddbmm is never read."""
    product = left.new_empty((left.shape[0], left.shape[1], right.shape[2]))
    return torch.baddbmm(product, left, right, beta=0, alpha=scale, out=product)


def _probabilities(
    rows: Tensor, keys: Tensor, start: int, end: int, softmax_scale: float, mask: Tensor
) -> Tensor:
    """softmax of queries start..end against keys 0..end: [groups, heads_per_group * block, end]."""
    scores = _scaled_bmm(rows, keys[:, :end].transpose(1, 2), softmax_scale)
    block = end - start
    diagonal = scores.view(rows.shape[0], -1, block, end)[..., start:]
    diagonal.add_(mask[:block, :block])
    return torch._softmax(scores, -1, False, out=scores)
