"""Cuts: all tokens once, as asked, and work in proportion to tokens."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.plan.cost import CostModel
from parallel.plan.cuts import cut, even_cut, even_shares
from parallel.plan.records import Piece

ATTENTION = CostModel(1.0, 0.0, 0.0)


def test_by_hand() -> None:
    assert even_shares(10, 3) == [4, 3, 3]
    assert cut(7, [4, 4]) == [(Piece(7, 0, 2), Piece(7, 6, 8)), (Piece(7, 2, 6),)]
    # Odd tokens go to the head and to the tail in turn.
    assert cut(0, [3, 3, 2]) == [
        (Piece(0, 0, 2), Piece(0, 7, 8)),
        (Piece(0, 2, 3), Piece(0, 5, 7)),
        (Piece(0, 3, 5),),
    ]
    assert cut(0, [1, 1, 1]) == [(Piece(0, 0, 1),), (Piece(0, 2, 3),), (Piece(0, 1, 2),)]
    assert cut(3, [5]) == [(Piece(3, 0, 5),)]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_every_token_once_and_work_by_tokens(shares: list[int]) -> None:
    length = sum(shares)
    parts = cut(0, shares)
    assert [sum(p.num_tokens for p in part) for part in parts] == shares
    tokens = sorted(t for part in parts for p in part for t in range(p.start, p.end))
    assert tokens == list(range(length))
    for part, share in zip(parts, shares, strict=True):
        work = ATTENTION.pieces_seconds([p.start for p in part], [p.end for p in part]).sum()
        # Off by no more than one token in the wrong half.
        assert work == pytest.approx(share * length, abs=2 * length)


@given(length=st.integers(1, 500), num_ranks=st.integers(1, 40))
def test_even_shares_differ_by_one(length: int, num_ranks: int) -> None:
    shares = even_shares(length, num_ranks)
    assert sum(shares) == length
    assert len(shares) == num_ranks
    assert max(shares) - min(shares) <= 1


@given(length=st.integers(0, 500), num_ranks=st.integers(1, 24))
def test_even_cuts_cover_the_sequence_and_are_even(length: int, num_ranks: int) -> None:
    shares = even_cut(3, length, num_ranks)
    assert len(shares) == num_ranks
    tokens = sorted(
        token for pieces in shares for piece in pieces for token in range(piece.start, piece.end)
    )
    assert tokens == list(range(length))
    sizes = [sum(piece.num_tokens for piece in pieces) for pieces in shares]
    assert max(sizes) - min(sizes) <= 2
    assert max(sizes) == max(even_shares(length, num_ranks))
    for pieces in shares:
        assert list(pieces) == sorted(pieces, key=lambda piece: piece.start)
        assert all(left.end < right.start for left, right in pairwise(pieces))


@given(num_ranks=st.integers(1, 8), tokens_per_part=st.integers(1, 20))
def test_even_cuts_have_equal_work(num_ranks: int, tokens_per_part: int) -> None:
    """Pairs of query and key on each rank are the same where the parts are of equal length."""
    length = 2 * num_ranks * tokens_per_part
    pairs = {
        sum(token + 1 for piece in pieces for token in range(piece.start, piece.end))
        for pieces in even_cut(0, length, num_ranks)
    }
    assert len(pairs) == 1
