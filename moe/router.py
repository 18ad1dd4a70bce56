"""The gate: which experts see a token, and with what weight.

    logits l = W x,  p = softmax(l),  chosen = the k largest of p,  weight_i = p_i

or, renormalised over the chosen, weight_i = p_i / sum of the chosen p: the softmax of the chosen
logits alone (GShard, Mixtral). Everything from the logits on is float32 whatever the model's dtype:
a rounding to bf16 would change choices. Nothing is dropped: an expert takes all who choose it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.records import Routing


def router_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """Logits of all experts, float32 [num_tokens, num_experts].

    Args:
        tokens: [num_tokens, hidden_size], any float dtype.
        weight: [num_experts, hidden_size].
    """
    return torch.nn.functional.linear(tokens.float(), weight.float())


def softmax_topk(
    logits: Tensor, *, topk: int, is_renormalised: bool = True, scaling_factor: float = 1.0
) -> Routing:
    """Softmax over all experts, then the `topk` likeliest (GShard, 2006.16668; Mixtral).

    Args:
        logits: float32 [num_tokens, num_experts].
        topk: experts of one token, at most num_experts.
        is_renormalised: the weights of one token sum to 1 (to `scaling_factor`); with topk=1 they
            are constant then, and the router learns nothing from the loss.
        scaling_factor: all weights are multiplied by it (DeepSeek-V2 and later).
    """
    probabilities = logits.softmax(dim=-1)
    weights, experts = probabilities.topk(topk, dim=-1)
    if is_renormalised:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(
        experts=experts,
        weights=weights * scaling_factor,
        probabilities=probabilities,
        counts=count_tokens(experts, num_experts=logits.shape[-1]),
    )


def count_tokens(experts: Tensor, *, num_experts: int) -> Tensor:
    """How often each expert stands in a choice: int64 [num_experts]."""
    chosen = experts.reshape(-1)
    # Unlike bincount it does not make the host wait for a GPU.
    return chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def z_loss(logits: Tensor) -> Tensor:
    """sum over tokens of (log sum exp of the logits)^2, float32 scalar (ST-MoE, 2202.08906, Eq. 5).

    A sum and no mean: it is divided by the global batch's tokens together with the loss itself.
    """
    return logits.logsumexp(dim=-1).square().sum()
