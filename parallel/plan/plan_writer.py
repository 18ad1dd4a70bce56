"""From a layout to a `StepPlan`: pieces by rank and micro-batch, heads or rings, what is offloaded.

Planners decide which ranks take what in which order; this writes it down. Of a shared sequence's
two ways to exchange the cheaper is taken for its number of ranks (`cost`), and of each micro-batch
as much is offloaded as its rank cannot hold (`offload_ratio`).
"""

from collections.abc import Iterable, Sequence

import numpy as np

from parallel.plan.cost import CostModel
from parallel.plan.cuts import even_cut
from parallel.plan.offload_ratio import HostMemory
from parallel.plan.records import MicroBatch, Piece, StepPlan


class PlanWriter:
    """A plan while it is written; sequences have the numbers of the batch."""

    def __init__(
        self,
        lengths: Sequence[int],
        num_ranks: int,
        tokens_per_rank: int,
        cost_model: CostModel,
        host_memory: HostMemory | None,
    ) -> None:
        self.lengths = tuple(lengths)
        self.rows: list[list[list[Piece]]] = [[] for _ in range(num_ranks)]
        """[rank][micro-batch]: its pieces; planners append to them."""
        self._capacity = tokens_per_rank
        self._cost_model = cost_model
        self._host_memory = host_memory
        self._cut: list[tuple[int, int]] = []

    def fill_up(self, rank: int, count: int) -> None:
        """Empty micro-batches until a rank has so many."""
        rows = self.rows[rank]
        rows += [[] for _ in range(count - len(rows))]

    def whole(self, sequences: Iterable[int]) -> list[Piece]:
        """These sequences, uncut, in their order."""
        return [Piece(i, 0, self.lengths[i]) for i in sorted(sequences)]

    def cut(self, sequence: int, num_ranks: int) -> list[tuple[Piece, ...]]:
        """The pieces of each rank, in ring order, of a sequence that is shared evenly."""
        self._cut.append((sequence, num_ranks))
        return even_cut(sequence, self.lengths[sequence], num_ranks)

    def plan(self) -> StepPlan:
        """What was written."""
        host = self._host_memory
        return StepPlan(
            lengths=self.lengths,
            tokens_per_rank=self._capacity,
            micro_batches=tuple(tuple(map(self._micro_batch, rows)) for rows in self.rows),
            ulysses=self._ulysses(),
            offloadable=host.offloadable if host else 0.0,
        )

    def _ulysses(self) -> tuple[int, ...]:
        by_heads = self._cost_model.prefers_ulysses(
            [self.lengths[sequence] for sequence, _ in self._cut],
            [num_ranks for _, num_ranks in self._cut],
        )
        return tuple(sorted(self._cut[i][0] for i in np.flatnonzero(by_heads).tolist()))

    def _micro_batch(self, pieces: list[Piece]) -> MicroBatch:
        if self._host_memory is None:
            return MicroBatch(tuple(pieces))
        num_tokens = sum(piece.num_tokens for piece in pieces)
        ratio = self._host_memory.ratio(num_tokens, tokens_per_rank=self._capacity)
        return MicroBatch(tuple(pieces), ratio)
