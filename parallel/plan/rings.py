"""Who shares a sequence with whom, and how a rank's row of tokens is laid out.

A plan says only where pieces are. What an executor needs to know follows: a sequence with pieces
on several ranks is *shared*; these ranks, in the order of their first pieces, form its *ring*.
Sequences of one micro-batch that have the same ranks in the same order travel together in one
`Ring`. A rank's row holds its whole sequences first, then ring by ring its pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel.errors import PlanError
from parallel.plan.records import Piece, StepPlan


@dataclass(frozen=True, slots=True)
class Ring:
    """Ranks that hold pieces of the same sequences, in ring order."""

    ranks: tuple[int, ...]
    """Data-parallel ranks."""
    pieces: tuple[tuple[tuple[Piece, ...], ...], ...]
    """[position in ranks][sequence of the ring]: that rank's pieces, ascending."""
    is_ulysses: bool = False
    """Whether they exchange heads by all-to-all instead of passing keys and values round; their
    number must then divide the number of query groups."""

    def position(self, rank: int) -> int:
        """Where a data-parallel rank stands in the ring."""
        return self.ranks.index(rank)

    def num_tokens(self, position: int) -> int:
        """Tokens that the rank at this position holds, of all sequences of the ring."""
        return sum(piece.num_tokens for pieces in self.pieces[position] for piece in pieces)


@dataclass(frozen=True, slots=True)
class RowLayout:
    """One micro-batch of one rank: what stands where in its row of tokens."""

    whole: tuple[Piece, ...]
    """Whole sequences, from row 0 on."""
    rings: tuple[Ring, ...]
    """Then this rank's pieces of each ring, sequence by sequence."""
    rank: int
    offload_ratio: float = 0.0

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces of this rank in the order of the row."""
        shared = (
            piece
            for ring in self.rings
            for pieces in ring.pieces[ring.position(self.rank)]
            for piece in pieces
        )
        return (*self.whole, *shared)


def row_layouts(plan: StepPlan, rank: int) -> tuple[RowLayout, ...]:
    """The rows of a rank's micro-batches, in the order in which it runs them.

    Raises:
        PlanError: a rank holds pieces of one sequence in two micro-batches.
    """
    wanted = {piece.sequence for batch in plan.micro_batches[rank] for piece in batch.pieces}
    holders = _holders(plan, wanted)
    ulysses = frozenset(plan.ulysses)
    layouts = []
    for batch in plan.micro_batches[rank]:
        whole: list[Piece] = []
        rings: dict[tuple[int, ...], list[int]] = {}
        seen: set[int] = set()
        for piece in batch.pieces:
            if piece.sequence in seen:
                continue
            seen.add(piece.sequence)
            ranks = tuple(holder for holder, _ in holders[piece.sequence])
            if len(ranks) == 1:
                # In one piece, however the plan wrote it down.
                whole.append(Piece(piece.sequence, 0, plan.lengths[piece.sequence]))
            else:
                rings.setdefault(ranks, []).append(piece.sequence)
        layouts.append(
            RowLayout(
                whole=tuple(whole),
                rings=tuple(
                    _ring(ranks, sequences, holders, ulysses)
                    for ranks, sequences in sorted(rings.items())
                ),
                rank=rank,
                offload_ratio=batch.offload_ratio,
            )
        )
    return tuple(layouts)


def _ring(
    ranks: tuple[int, ...],
    sequences: Sequence[int],
    holders: dict[int, list[tuple[int, tuple[Piece, ...]]]],
    ulysses: frozenset[int],
) -> Ring:
    # The same order of sequences on every rank, whatever order its micro-batch lists them in.
    ordered = sorted(sequences)
    return Ring(
        ranks,
        tuple(
            tuple(holders[sequence][position][1] for sequence in ordered)
            for position in range(len(ranks))
        ),
        # What travels together travels alike.
        is_ulysses=ulysses.issuperset(ordered),
    )


def _holders(plan: StepPlan, wanted: set[int]) -> dict[int, list[tuple[int, tuple[Piece, ...]]]]:
    """For each wanted sequence its ranks in ring order, with their pieces in ascending order."""
    found: dict[int, dict[int, list[Piece]]] = {sequence: {} for sequence in wanted}
    places: dict[tuple[int, int], int] = {}
    is_wanted = np.zeros(len(plan.lengths), dtype=bool)
    is_wanted[list(wanted)] = True
    for rank, batches in enumerate(plan.micro_batches):
        for index, batch in enumerate(batches):
            for piece in batch.pieces:
                if not is_wanted[piece.sequence]:
                    continue
                if places.setdefault((piece.sequence, rank), index) != index:
                    raise PlanError(
                        f"rank {rank} holds pieces of sequence {piece.sequence} in micro-batches "
                        f"{places[piece.sequence, rank]} and {index}; they belong in one"
                    )
                found[piece.sequence].setdefault(rank, []).append(piece)
    ordered = {}
    for sequence, by_rank in found.items():
        sorted_pieces = [
            (rank, tuple(sorted(pieces, key=lambda piece: piece.start)))
            for rank, pieces in by_rank.items()
        ]
        ordered[sequence] = sorted(sorted_pieces, key=lambda entry: entry[1][0].start)
    return ordered
