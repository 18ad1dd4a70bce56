"""Experts choose tokens (Zhou et al., 2202.09368).

    of expert i: the `capacity` tokens with the largest s_ti,        weight_ti = s_ti

Every expert has the same load, by construction, and a token may be seen by many experts or by none.
Which tokens an expert takes depends on all tokens of the micro-batch, on later ones of a sequence
too: so it depends on the cut into micro-batches, and a language model's loss with it is not that of
a model that sees only the past.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_choice(scores: Tensor, *, capacity: int) -> tuple[Tensor, Tensor]:
    """Each expert's choice, token by token.

    Args:
        scores: float32 [num_tokens, num_experts].
        capacity: tokens of one expert, at most num_tokens.

    Returns:
        (experts, weights), int64 and float32 [num_tokens, num_experts], best first; `num_experts`
        with weight 0 behind those that chose the token. So wide because all may choose one, and
        ranks that exchange tokens need rows of one width.
    """
    num_experts = scores.shape[1]
    chosen = scores.detach().topk(capacity, dim=0).indices
    is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, chosen, True)
    experts = scores.detach().masked_fill(~is_chosen, -1.0).argsort(dim=-1, descending=True)
    is_nowhere = ~is_chosen.gather(1, experts)
    weights = scores.gather(1, experts).masked_fill(is_nowhere, 0.0)
    return experts.masked_fill(is_nowhere, num_experts), weights
