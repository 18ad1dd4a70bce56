"""From a measured layer to its chunks: what `moe_num_chunks: auto` does.

How many bytes and rows a rank has is not known before tokens are routed, and may not decide: ranks
would disagree. So the choice is made once for a full micro-batch under uniform routing. With e
ranks, n nodes, T tokens and K of E experts for each, a given part of E / p experts is hit with

    q_p = 1 - C(E - E/p, K) / C(E, K)

so T (n - 1) q_n rows cross between nodes, T n q_n arrive at the ranks of a node's place, and
T (e - n) q_e are passed on inside (docs/performance: bytes of all-to-all). Where similar tokens
travel as one, T K rate rows are left, each for one expert: a share of 1 - 1 / p crosses to others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe.schedule.choose import MAX_CHUNKS, Chunking, choose_passes
from moe.schedule.profile import LayerProfile


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """What one rank has in a full micro-batch.

    Attributes:
        num_ranks: of the expert-parallel group.
        num_nodes: that it is spread over, where tokens travel in two legs; else None.
        row_bytes: of one token on the wire.
        rate: rows that travel for each choice where similar tokens travel as one; else None.
    """

    num_tokens: int
    num_experts: int
    topk: int
    num_ranks: int
    num_nodes: int | None
    row_bytes: int
    rate: float | None = None

    @property
    def leg_bytes(self) -> tuple[float, ...]:
        """Sent to other ranks on each leg out, under uniform routing."""
        if self.rate is not None:
            return self._centroid_bytes(self.num_rows * self.row_bytes)
        to_ranks = hit_share(self.num_experts, self.topk, parts=self.num_ranks)
        wire = self.num_tokens * self.row_bytes
        if self.num_nodes is None:
            return (wire * (self.num_ranks - 1) * to_ranks,)
        to_nodes = hit_share(self.num_experts, self.topk, parts=self.num_nodes)
        return (
            wire * (self.num_nodes - 1) * to_nodes,
            wire * (self.num_ranks - self.num_nodes) * to_ranks,
        )

    def _centroid_bytes(self, wire: float) -> tuple[float, ...]:
        if self.num_nodes is None:
            return (wire * (1 - 1 / self.num_ranks),)
        ranks_per_node = self.num_ranks // self.num_nodes
        return wire * (1 - 1 / self.num_nodes), wire * (1 - 1 / ranks_per_node)

    @property
    def num_rows(self) -> int:
        """That one rank's experts compute."""
        return round(self.num_tokens * self.topk * (1.0 if self.rate is None else self.rate))


def hit_share(num_experts: int, topk: int, *, parts: int) -> float:
    """q: how probably one of `parts` equal parts of the experts has one of a token's choices."""
    others = num_experts - num_experts // parts
    return 1.0 - math.comb(others, topk) / math.comb(num_experts, topk)


def choose_for(
    profile: LayerProfile, load: LayerLoad, *, max_chunks: int = MAX_CHUNKS
) -> tuple[Chunking, Chunking]:
    """Forward and backward of a layer."""
    passes = profile.passes(leg_bytes=load.leg_bytes, num_rows=load.num_rows)
    return choose_passes(*passes, max_chunks=max(1, min(max_chunks, load.num_tokens)))
