"""A rank's tokens in chunks of equal size, and the routing of each.

Chunk c of r has tokens  c T / r  up to  (c + 1) T / r  (rounded down): a pure function of this
rank's count and r. Ranks have different counts, also none, and as many chunks; some may be empty.
"""

from __future__ import annotations

import itertools

import torch

from moe.records import Routing


def cut(num_tokens: int, num_chunks: int) -> list[slice]:
    """The tokens of each chunk, in order."""
    starts = [chunk * num_tokens // num_chunks for chunk in range(num_chunks + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(starts)]


def cut_routing(routing: Routing, num_chunks: int) -> list[Routing]:
    """The routing of each chunk, without gradients."""
    if num_chunks == 1:
        return [routing]
    return [_part(routing, tokens) for tokens in cut(routing.num_tokens, num_chunks)]


def _part(routing: Routing, tokens: slice) -> Routing:
    experts = routing.experts[tokens]
    # One more place, for choices that lead nowhere.
    counts = routing.counts.new_zeros(routing.num_experts + 1)
    chosen = experts.reshape(-1)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    return Routing(
        experts=experts,
        weights=routing.weights[tokens].detach(),
        probabilities=routing.probabilities[tokens].detach(),
        counts=counts[:-1],
        dropped=None if routing.dropped is None else torch.zeros_like(routing.dropped),
    )
