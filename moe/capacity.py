"""A limit on the tokens of one expert, and who has to stay away when it is reached.

    capacity = ceil(factor * num_tokens * topk / num_experts)

An expert refuses the choices beyond its capacity; a refused token misses that expert's answer and
goes on with what its others say (GShard, 2006.16668). Who is refused:

    probs       those with the smallest weight (megatron's default)
    position    the last ones
    random      by lot (random token selection, DeepSpeed-MoE), so that the end of a row is not
                always what is lost

The tokens are those of one rank's micro-batch, as in DeepSpeed and megatron. So what is dropped
depends on how the batch is cut; without a capacity nothing does.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from moe.gate.random_numbers import random_bits

DropPolicy = Literal["probs", "position", "random"]


def expert_capacity(num_tokens: int, *, topk: int, num_experts: int, factor: float) -> int:
    """Tokens that one expert takes of so many; known on the host."""
    return math.ceil(factor * num_tokens * topk / num_experts)


def within_capacity(
    experts: Tensor,
    weights: Tensor,
    *,
    num_experts: int,
    capacity: int,
    policy: DropPolicy,
    keys: Tensor | None = None,
) -> Tensor:
    """Which choices an expert takes: bool [num_tokens, topk].

    Args:
        experts: int64 [num_tokens, topk].
        weights: float32 [num_tokens, topk].
        keys: int64 [num_tokens] (`token_keys`), needed by "random".

    Raises:
        ValueError: "random" without keys.
    """
    choices = _by_priority(experts, weights, policy, keys)
    of_choice = experts.reshape(-1)[choices]
    by_expert = of_choice.argsort(stable=True)
    of_row = of_choice[by_expert]
    # Each expert's first row, so that a row knows its place in its expert's queue.
    starts = torch.searchsorted(of_row, torch.arange(num_experts + 1, device=experts.device))
    places = torch.arange(of_row.numel(), device=experts.device) - starts[of_row]
    is_taken = torch.empty(experts.numel(), dtype=torch.bool, device=experts.device)
    is_taken[choices[by_expert]] = (places < capacity) & (of_row < num_experts)
    return is_taken.view(experts.shape)


def _by_priority(
    experts: Tensor, weights: Tensor, policy: DropPolicy, keys: Tensor | None
) -> Tensor:
    """All choices, first those that are served first: int64 [num_tokens * topk]."""
    if policy == "position":
        return torch.arange(experts.numel(), device=experts.device)
    if policy == "probs":
        return weights.detach().reshape(-1).argsort(descending=True, stable=True)
    if keys is None:
        raise ValueError("drawing lots needs a key for each token")
    lots = random_bits(keys, experts.shape[1]).reshape(-1)
    return lots.argsort(stable=True)
