"""Who shares what with whom, and how a row is laid out."""

from __future__ import annotations

import pytest

from parallel.errors import PlanError
from parallel.plan.records import MicroBatch, Piece, StepPlan
from parallel.plan.rings import row_layouts


def plan_of(*ranks: list[tuple[Piece, ...]], lengths: tuple[int, ...]) -> StepPlan:
    batches = tuple(tuple(MicroBatch(pieces) for pieces in rank) for rank in ranks)
    return StepPlan(lengths=lengths, tokens_per_rank=100, micro_batches=batches)


def test_layout_has_whole_sequences_first_then_rings() -> None:
    # In ring order: sequence 1 on ranks 2 and 0, sequence 2 on 0, 1, 2, sequence 3 on 2 and 0.
    plan = plan_of(
        [(Piece(1, 4, 8), Piece(0, 0, 5), Piece(2, 0, 3), Piece(3, 2, 4))],
        [(Piece(2, 3, 6),)],
        [(Piece(3, 0, 2), Piece(1, 0, 4), Piece(2, 6, 9))],
        lengths=(5, 8, 9, 4),
    )
    (layout,) = row_layouts(plan, 0)
    assert layout.whole == (Piece(0, 0, 5),)
    assert [ring.ranks for ring in layout.rings] == [(0, 1, 2), (2, 0)]
    both = layout.rings[1]
    assert both.pieces == (
        ((Piece(1, 0, 4),), (Piece(3, 0, 2),)),
        ((Piece(1, 4, 8),), (Piece(3, 2, 4),)),
    )
    assert layout.pieces == (Piece(0, 0, 5), Piece(2, 0, 3), Piece(1, 4, 8), Piece(3, 2, 4))
    (other,) = row_layouts(plan, 2)
    assert other.rings == layout.rings
    assert other.pieces == (Piece(2, 6, 9), Piece(1, 0, 4), Piece(3, 0, 2))


def test_two_micro_batches_with_one_sequence_are_refused() -> None:
    plan = plan_of([(Piece(0, 0, 2),), (Piece(0, 2, 4),)], [(Piece(0, 4, 6),)], lengths=(6,))
    with pytest.raises(PlanError, match="rank 0 holds pieces of sequence 0 in micro-batches 0 and"):
        row_layouts(plan, 1)
