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


def _one_document(
    query: Tensor, key: Tensor, value: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    length = query.shape[0]
    scores = softmax_scale * torch.einsum("ihd,jhd->hij", query, key)
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(diagonal=1)
    scores = scores.masked_fill(future, -torch.inf)
    log_sum_exp = scores.logsumexp(dim=-1)
    probabilities = torch.exp(scores - log_sum_exp.unsqueeze(-1))
    return torch.einsum("hij,jhd->ihd", probabilities, value), log_sum_exp
