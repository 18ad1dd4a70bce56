"""Where the rows of a ring's ranks belong when each rank has whole sequences and some heads.

The ranks' rows arrive rank by rank in ring order, each rank's sequence by sequence, piece by piece.
Attention wants sequence by sequence, token by token: a permutation that all layers share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.plan.records import Piece
from parallel.plan.rings import Ring


@dataclass(frozen=True, slots=True)
class SequenceOrder:
    """How a ring's rows become its sequences."""

    member_rows: tuple[slice, ...]
    """For each rank of the ring, in ring order, its rows among those of all."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    source: npt.NDArray[np.int64]
    """[num_tokens]: for each token, in sequence order, its row among those of all."""


def sequence_order(ring: Ring) -> SequenceOrder:
    """The permutation of a ring; the same on each of its ranks."""
    member_rows, first = [], 0
    found: list[list[tuple[Piece, int]]] = [[] for _ in ring.pieces[0]]
    for position in range(len(ring.ranks)):
        row = first
        for sequence, pieces in enumerate(ring.pieces[position]):
            for piece in pieces:
                found[sequence].append((piece, row))
                row += piece.num_tokens
        member_rows.append(slice(first, row))
        first = row
    ordered = [sorted(pieces, key=lambda entry: entry[0].start) for pieces in found]
    return SequenceOrder(
        member_rows=tuple(member_rows),
        lengths=tuple(sum(piece.num_tokens for piece, _ in pieces) for pieces in ordered),
        source=_ranges(
            [(row, row + piece.num_tokens) for pieces in ordered for piece, row in pieces]
        ),
    )


def _ranges(ranges: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    parts = [np.arange(start, end, dtype=np.int64) for start, end in ranges]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
