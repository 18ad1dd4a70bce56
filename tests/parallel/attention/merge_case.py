"""Attention over two sets of keys, to be merged, and over both sets at once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.attention.reference import reference_block

Merge = Callable[..., None]


@dataclass(frozen=True, slots=True)
class MergeCase:
    """Queries that see some keys, and some of them more keys."""

    num_queries: int
    num_keys: int
    num_more_keys: int
    num_heads: int = 2
    head_dim: int = 8
    every: int = 1
    """Each so-manieth query sees the second set of keys."""
    scale: float = 1.0
    """Of the scores: large ones make one set irrelevant."""
    part_dtype: torch.dtype = torch.float32


CASES = (
    MergeCase(5, 7, 3),
    MergeCase(1, 1, 1, num_heads=1, head_dim=1),
    MergeCase(9, 4, 6, num_heads=3, head_dim=33),
    MergeCase(9, 4, 6, every=2),
    MergeCase(6, 5, 4, num_heads=17),
    MergeCase(6, 5, 4, scale=100.0),
    MergeCase(6, 0, 4),
    MergeCase(6, 5, 0),
    MergeCase(6, 0, 0),
    MergeCase(8, 5, 4, every=3, part_dtype=torch.bfloat16),
)


def check_merge(merge: Merge, case: MergeCase, dtype: torch.dtype = torch.float32) -> None:
    """The merge of both parts against attention over all keys, in float64."""
    torch.manual_seed(0)
    shape = (case.num_heads, case.head_dim)
    query = case.scale * torch.randn(case.num_queries, *shape, dtype=torch.float64)
    num_all = case.num_keys + case.num_more_keys
    key, value = torch.randn(2, num_all, *shape, dtype=torch.float64).unbind()
    rows = torch.arange(0, case.num_queries, case.every)
    exact, exact_lse = _attention(query, key[: case.num_keys], value[: case.num_keys])
    exact[rows], exact_lse[:, rows] = _attention(query[rows], key, value)

    output, log_sum_exp = _attention(query, key[: case.num_keys], value[: case.num_keys])
    output, log_sum_exp = output.to(dtype), log_sum_exp.to(dtype)
    part, part_lse = _attention(query[rows], key[case.num_keys :], value[case.num_keys :])
    merge(
        output,
        log_sum_exp,
        part.to(case.part_dtype),
        part_lse.to(dtype),
        rows=None if case.every == 1 else rows.int(),
    )
    # Log-sum-exps are rounded to their own size, and that error stands in the exponent of weights.
    eps = torch.finfo(dtype).eps
    largest_lse = float(torch.cat((part_lse, exact_lse), dim=1).nan_to_num(neginf=0).abs().max())
    largest = float(value.abs().max()) if num_all else 0.0
    allowed = largest * (torch.finfo(case.part_dtype).eps + eps * (4 + largest_lse))
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=allowed)
    torch.testing.assert_close(
        log_sum_exp.double(), exact_lse, rtol=0, atol=2 * eps * (1 + largest_lse)
    )


def _attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output [num_queries, num_heads, head_dim] and log-sum-exp [num_heads, num_queries]."""
    output, log_sum_exp = reference_block(query, key, value, softmax_scale=1.0, is_causal=False)
    by_token = output.flatten(0, 1).transpose(0, 1).contiguous()
    return by_token, log_sum_exp.flatten(0, 1).contiguous()
