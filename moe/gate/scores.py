"""From logits to scores, and from scores to probabilities.

    softmax     s = softmax(l)          p = s
    sigmoid     s_i = 1 / (1 + e^-l_i)  p = s / sum_j s_j        (DeepSeek-V3, 2412.19437)

Tokens choose by s; balancing losses are made of p, whose rows sum to 1 in both cases.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScoreFunction = Literal["softmax", "sigmoid"]


def gate_scores(logits: Tensor, score_function: ScoreFunction) -> Tensor:
    """s, float32 [num_tokens, num_experts]."""
    return logits.softmax(dim=-1) if score_function == "softmax" else logits.sigmoid()


def gate_probabilities(logits: Tensor, score_function: ScoreFunction) -> Tensor:
    """p, float32 [num_tokens, num_experts]; each row sums to 1."""
    if score_function == "sigmoid":
        # s / sum s, also where all s are too small for float32.
        logits = torch.nn.functional.logsigmoid(logits)
    return logits.softmax(dim=-1)


def chosen_weights(
    scores: Tensor, experts: Tensor, *, is_renormalised: bool, scaling_factor: float
) -> Tensor:
    """What each chosen expert's answer is multiplied by, float32 [num_tokens, topk].

    Args:
        experts: int64 [num_tokens, topk].
        is_renormalised: the weights of one token sum to `scaling_factor`.
    """
    weights = scores.gather(-1, experts)
    if is_renormalised:
        tiny = torch.finfo(weights.dtype).tiny
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(tiny)
    return weights * scaling_factor if scaling_factor != 1.0 else weights
