"""How one sequence is cut for the ranks that share it: head to tail, so that all see equal work.

Under a causal mask the last tokens of a sequence cost most. Cut in 2 N parts of (almost) equal
length, part i and part 2 N - 1 - i together hold as many tokens and as many pairs of query and key
as any other such two: rank i of N takes these (ByteScale, section 5.1; arXiv 2502.21231).
"""

from collections.abc import Sequence

from parallel.plan.records import Piece


def head_tail_pieces(sequence: int, length: int, num_ranks: int) -> list[tuple[Piece, ...]]:
    """The pieces of each of `num_ranks` ranks, in ring order.

    Part sizes differ by one token at most; a sequence of fewer than 2 num_ranks tokens leaves
    some ranks with one piece or none. One rank gets the sequence whole.
    """
    if num_ranks == 1:
        return [_pieces(sequence, ((0, length),))]
    num_parts = 2 * num_ranks
    border = [length * part // num_parts for part in range(num_parts + 1)]
    return [
        _pieces(
            sequence,
            (
                (border[rank], border[rank + 1]),
                (border[num_parts - 1 - rank], border[num_parts - rank]),
            ),
        )
        for rank in range(num_ranks)
    ]


def largest_share(length: int, num_ranks: int) -> int:
    """Tokens of the rank that gets most of a sequence cut head to tail."""
    if num_ranks == 1:
        return length
    return max(
        sum(piece.num_tokens for piece in pieces)
        for pieces in head_tail_pieces(0, length, num_ranks)
    )


def _pieces(sequence: int, ranges: Sequence[tuple[int, int]]) -> tuple[Piece, ...]:
    """Pieces of the ranges that hold a token; two that touch become one."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if start == end:
            continue
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return tuple(Piece(sequence, start, end) for start, end in merged)
