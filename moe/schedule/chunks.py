"""A rank's tokens in chunks of equal size, and the routing of each.

Chunk c of r has tokens c, c + r, c + 2 r, ...: a pure function of this rank's count and r, and fair
to experts and links where neighbours choose alike, as centroids do, which stand expert by expert.
Ranks have different counts, also none, and as many chunks; some may be empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.records import Routing


def cut(num_tokens: int, num_chunks: int) -> list[slice]:
    """The tokens of each chunk, in order."""
    return [slice(chunk, num_tokens, num_chunks) for chunk in range(num_chunks)]


def join(chunks: Sequence[Tensor], num_tokens: int) -> Tensor:
    """The tokens of all chunks, [num_tokens, ...], in their order before `cut`."""
    if len(chunks) == 1:
        return chunks[0]
    whole = chunks[0].new_empty((num_tokens, *chunks[0].shape[1:]))
    for part, chunk in zip(cut(num_tokens, len(chunks)), chunks, strict=True):
        whole[part] = chunk
    return whole


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
