"""Head-to-tail cuts with borders anywhere: a rank's tokens are its share of the work.

With as many tokens from the head of a sequence as from its tail, outermost first, a rank that holds
n of s tokens holds n / s of the causal pairs: the part a..b of the head and its mirror image have
(b - a) s pairs together. So work can be given out in tokens, and a rank that has other things to
do in the same micro-batch is given less. Even cuts are ByteScale's, section 5.1.
"""

from collections.abc import Sequence

from parallel.plan.records import Piece


def even_shares(length: int, num_ranks: int) -> list[int]:
    """Tokens of each rank, which differ by one at most; none is 0 if num_ranks <= length."""
    share, over = divmod(length, num_ranks)
    return [share + 1] * over + [share] * (num_ranks - over)


def even_cut(sequence: int, length: int, num_ranks: int) -> list[tuple[Piece, ...]]:
    """The pieces of each rank in ring order; with fewer tokens than ranks some have none."""
    return cut(sequence, even_shares(length, num_ranks))


def cut(sequence: int, shares: Sequence[int]) -> list[tuple[Piece, ...]]:
    """The pieces of each rank in ring order, from its tokens; no rank behind one without any."""
    length = sum(shares)
    head, tail = 0, length
    pieces = []
    for share in shares[:-1]:
        # The odd tokens go to head and tail in turn.
        in_head = (share + (head <= length - tail)) // 2
        in_tail = share - in_head
        part = []
        if in_head:
            part.append(Piece(sequence, head, head + in_head))
        if in_tail:
            part.append(Piece(sequence, tail - in_tail, tail))
        pieces.append(tuple(part))
        head += in_head
        tail -= in_tail
    pieces.append((Piece(sequence, head, tail),) if head < tail else ())
    return pieces
