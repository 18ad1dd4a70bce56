"""Logits that are angles: the gate of X-MoE (Chi et al., 2204.09179, section 3).

    logit_i = cos(P x, e_i) / tau,        P: hidden_size -> few dimensions

A scalar product lets hidden states gather around the experts' embeddings e_i until all tokens look
alike; few dimensions and lengths of 1 keep the router out of the way of what the hidden states say.
The temperature is learned as tau = tau_0 / scale, with the scale starting at 1; the paper's tau_0
is 0.3 for softmax and 0.07 for sigmoid, its number of dimensions half the number of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.gate.scores import ScoreFunction


def cosine_logits(
    tokens: Tensor, projection: Tensor, embeddings: Tensor, scale: Tensor, *, temperature: float
) -> Tensor:
    """Logits of all experts, float32 [num_tokens, num_experts].

    Args:
        tokens: [num_tokens, hidden_size].
        projection: [projected_size, hidden_size].
        embeddings: [num_experts, projected_size].
        scale: [1], learned.
        temperature: tau_0.
    """
    projected = torch.nn.functional.linear(tokens.float(), projection.float())
    cosines = torch.nn.functional.linear(_unit(projected), _unit(embeddings.float()))
    return cosines * (scale.float() / temperature)


def first_temperature(score_function: ScoreFunction) -> float:
    """tau_0."""
    return 0.3 if score_function == "softmax" else 0.07


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)
