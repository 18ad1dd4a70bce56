"""Causal attention of one document by blocks of queries, from batched matrix products.

A block of queries sees the keys up to its own end, so the work is the causal triangle in steps of
`QUERY_BLOCK` instead of the whole square, and no more than one block of scores exists at a time.
Backward computes the probabilities again from query and key: nothing is saved but the inputs.

Why it exists beside torch's flash kernel for the CPU: that one computes the whole square for
documents up to 512 tokens and uses small products in its backward. Forward + backward of 4096
tokens in documents of 512, 8 heads of 64, one thread of an AMD EPYC (Zen 4), torch 2.13, November
2026: 109 ms here and 237 ms there in bfloat16, 166 and 241 ms in float32.

Scores and probabilities are held in the inputs' precision, as in unfused attention everywhere;
products, softmax and the sums over blocks are float32 inside.

Grouped-query attention costs no copy of keys: the query heads of one group are more rows of the
same product. Row r of a block is (head within group, query), group by group.

For bfloat16 torch compiles each new shape of product, for about a millisecond, and real documents
have all lengths; so the last block is filled up with zeros to a multiple of `BF16_ROWS`. Filled-up
keys lie behind every real query, which cannot see them; filled-up queries are thrown away, and the
zeros in their place in the output's gradient add nothing to backward's sums.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_BLOCK = 128
BF16_ROWS = 64
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
    for part in parts(query, key):
        keys, values = part.rows(key), part.rows(value)
        for start, end in part.blocks:
            queries = part.rows(query, start, end)
            probabilities = _probabilities(queries, keys, start, end, softmax_scale, mask)
            part.write(output, torch.bmm(probabilities, values[:, :end]), start, end)


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
    for part in parts(query, key):
        keys, values = part.rows(key), part.rows(value)
        grad_keys = grad_values = None
        # From the last block to the first: the last one sees every key, so its share is where
        # the sums over blocks begin.
        for start, end in reversed(part.blocks):
            queries = part.rows(query, start, end)
            grad_rows = part.rows(grad_output, start, end)
            probabilities = _probabilities(queries, keys, start, end, softmax_scale, mask)
            grad_probabilities = torch.bmm(grad_rows, values[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            )
            part.write(
                grad_query, scaled_bmm(grad_scores, keys[:, :end], softmax_scale), start, end
            )

            share_of_keys = scaled_bmm(grad_scores.transpose(1, 2), queries, softmax_scale)
            share_of_values = torch.bmm(probabilities.transpose(1, 2), grad_rows)
            if grad_keys is None or grad_values is None:
                grad_keys = share_of_keys.to(accumulate_dtype)
                grad_values = share_of_values.to(accumulate_dtype)
            else:
                grad_keys[:, :end] += share_of_keys
                grad_values[:, :end] += share_of_values
        assert grad_keys is not None
        assert grad_values is not None
        part.write(grad_key, grad_keys)
        part.write(grad_value, grad_values)


@dataclass(frozen=True, slots=True)
class Part:
    """Some key/value groups of one document, and the blocks of its queries."""

    num_groups: int
    """Of the whole document."""
    groups: slice
    blocks: list[tuple[int, int]]
    """Half-open; the last may reach behind the document's end, into rows filled up with zeros."""

    def rows(self, x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """[groups, heads per group * (end - start), head_dim]: x from start to end, by default all.

        x: [length, heads, head_dim], its heads a multiple of num_groups.
        """
        end = self.blocks[-1][1] if end is None else end
        real = self._by_group(x[start:end])
        groups, heads_per_group, num_real, head_dim = real.shape
        rows = x.new_empty((groups, heads_per_group, end - start, head_dim))
        rows[:, :, :num_real] = real
        rows[:, :, num_real:] = 0
        return rows.flatten(1, 2)

    def write(self, x: Tensor, rows: Tensor, start: int = 0, end: int | None = None) -> None:
        """The inverse of `rows`, into x; what lies behind the document's end is dropped."""
        end = self.blocks[-1][1] if end is None else end
        real = self._by_group(x[start:end])
        by_group = rows.view(*real.shape[:2], end - start, real.shape[3])
        real.copy_(by_group[:, :, : real.shape[2]])

    def _by_group(self, x: Tensor) -> Tensor:
        """View [length, heads, head_dim] as [groups, heads per group, length, head_dim]."""
        length, num_heads, head_dim = x.shape
        split = x.view(length, self.num_groups, num_heads // self.num_groups, head_dim)
        return split[:, self.groups].permute(1, 2, 0, 3)


def parts(query: Tensor, key: Tensor) -> Iterator[Part]:
    """The queries in parts of at most `MAX_SCORES` scores a block, and at least one group."""
    num_heads, num_groups = query.shape[1], key.shape[1]
    filled, num_keys = filled_length(query), filled_length(key)
    blocks = [(start, min(start + QUERY_BLOCK, filled)) for start in range(0, filled, QUERY_BLOCK)]
    scores_per_group = num_heads // num_groups * min(QUERY_BLOCK, filled) * num_keys
    most = max(1, MAX_SCORES // scores_per_group)
    # A divisor, so that all parts have the same shapes.
    step = next(n for n in range(min(most, num_groups), 0, -1) if num_groups % n == 0)
    for first in range(0, num_groups, step):
        yield Part(num_groups, slice(first, first + step), blocks)


def filled_length(x: Tensor) -> int:
    """Rows of [length, heads, head_dim] with those filled up."""
    multiple = BF16_ROWS if x.dtype == torch.bfloat16 else 1
    return -(-x.shape[0] // multiple) * multiple


def scaled_bmm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right; with beta=0 the first argument of baddbmm is never read."""
    product = left.new_empty((left.shape[0], left.shape[1], right.shape[2]))
    return torch.baddbmm(product, left, right, beta=0, alpha=scale, out=product)


def _probabilities(
    queries: Tensor, keys: Tensor, start: int, end: int, softmax_scale: float, mask: Tensor
) -> Tensor:
    """softmax of queries start..end against keys 0..end: [groups, heads per group * block, end]."""
    scores = scaled_bmm(queries, keys[:, :end].transpose(1, 2), softmax_scale)
    block = end - start
    diagonal = scores.view(queries.shape[0], -1, block, end)[..., start:]
    diagonal.add_(mask[:block, :block])
    return torch._softmax(scores, -1, False, out=scores)
