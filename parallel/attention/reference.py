"""Packed causal attention as the formula says it: the definition every kernel is tested against.

Within one document, for query head h, its key/value group g(h) and scale c:

    s_ij = c * q_i . k_j   for j <= i,   -inf for j > i
    lse_i = log sum_j exp(s_ij)
    o_i = sum_j exp(s_ij - lse_i) v_j

Everything runs in float32 (float64 stays float64). `lse` is what two partial results over different
keys need to be merged, so it is part of the definition.
"""

import torch
from torch import Tensor

from parallel.attention.documents import CuSeqlens, document_ranges, zeros_in_graph


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: CuSeqlens,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Causal self-attention inside each document.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_query_groups, head_dim].
    Returns output [num_tokens, num_heads, head_dim] and log-sum-exp [num_heads, num_tokens], both
    at least float32. Tokens in no document have output 0 and log-sum-exp -inf.
    """
    num_tokens, num_heads, _ = query.shape
    precision = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (x.to(precision) for x in (query, key, value))
    heads_per_group = num_heads // key.shape[1]
    key, value = (x.repeat_interleave(heads_per_group, dim=1) for x in (key, value))

    outputs, log_sum_exps, position = [], [], 0
    for start, end in document_ranges(cu_seqlens, num_tokens=num_tokens):
        output, log_sum_exp = _one_document(
            query[start:end], key[start:end], value[start:end], softmax_scale
        )
        outputs.append(output)
        log_sum_exps.append(log_sum_exp)
        position = end
    outputs.append(zeros_in_graph(query[position:]))
    log_sum_exps.append(query.new_full((num_heads, num_tokens - position), -torch.inf))
    return torch.cat(outputs), torch.cat(log_sum_exps, dim=1)


def reference_block(
    query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of queries over other keys, all visible, or (is_causal) over those of themselves.

    query: [num_queries, num_heads, head_dim]; key, value: [num_keys, num_query_groups, head_dim].
    Returns output [num_query_groups, heads_per_group, num_queries, head_dim] and log-sum-exp
    [num_query_groups, heads_per_group, num_queries], at least float32.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    num_groups = key.shape[1]
    heads_per_group = query.shape[1] // num_groups
    query, key, value = (x.to(precision) for x in (query, key, value))
    key, value = (x.repeat_interleave(heads_per_group, dim=1) for x in (key, value))
    output, log_sum_exp = _one_document(query, key, value, softmax_scale, is_causal=is_causal)
    length, _, head_dim = output.shape
    return (
        output.transpose(0, 1).reshape(num_groups, heads_per_group, length, head_dim),
        log_sum_exp.view(num_groups, heads_per_group, length),
    )


def reference_block_backward(
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
    """These keys' share of the gradients, from output and log-sum-exp over all keys.

    With p_ij = exp(s_ij - lse_i) and g_i the gradient of o_i:

        ds_ij = p_ij (g_i . v_j - g_i . o_i)
        dq_i = c sum_j ds_ij k_j      dk_j = c sum_i ds_ij q_i      dv_j = sum_i p_ij g_i

    grad_output, output: as query; log_sum_exp: as `reference_block` gives it. Returns the gradients
    of query [num_query_groups, heads_per_group, num_queries, head_dim] and of key and value
    [num_keys, num_query_groups, head_dim].
    """
    precision = log_sum_exp.dtype
    num_groups = key.shape[1]
    by_group = (query.shape[0], num_groups, query.shape[1] // num_groups, query.shape[2])
    query, output, grad = (x.to(precision).reshape(by_group) for x in (query, output, grad_output))
    key, value = key.to(precision), value.to(precision)
    scores = softmax_scale * torch.einsum("ighd,jgd->ghij", query, key)
    if is_causal:
        scores = scores.masked_fill(_future(scores), -torch.inf)
    probabilities = torch.exp(scores - log_sum_exp.unsqueeze(-1))
    grad_scores = torch.einsum("ighd,jgd->ghij", grad, value)
    grad_scores = grad_scores - torch.einsum("ighd,ighd->ghi", grad, output).unsqueeze(-1)
    grad_scores = softmax_scale * probabilities * grad_scores
    return (
        torch.einsum("ghij,jgd->ghid", grad_scores, key),
        torch.einsum("ghij,ighd->jgd", grad_scores, query),
        torch.einsum("ghij,ighd->jgd", probabilities, grad),
    )


def _one_document(
    query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, *, is_causal: bool = True
) -> tuple[Tensor, Tensor]:
    scores = softmax_scale * torch.einsum("ihd,jhd->hij", query, key)
    if is_causal:
        scores = scores.masked_fill(_future(scores), -torch.inf)
    log_sum_exp = scores.logsumexp(dim=-1)
    probabilities = torch.exp(scores - log_sum_exp.unsqueeze(-1))
    return torch.einsum("hij,jhd->ihd", probabilities, value), log_sum_exp


def _future(scores: Tensor) -> Tensor:
    """[queries, keys]: true where a key comes after the query."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(diagonal=1)
