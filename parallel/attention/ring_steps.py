"""The steps of a ring as numbers: which rows see which rows, and what travels to whom.

In a ring of N ranks the one at position p computes, in step j = 0..N-1, its queries against the
keys and values of position p - j (mod N). These come from position p - 1, which had them in step
j - 1, and go on to p + 1. In step 0 a rank's rows of one sequence, ascending, see each other
causally. In a later step a query piece sees those pieces of the other rank that end before it
begins, which are the first rows that rank has of the sequence: a rectangle with no mask inside.

All rings of a micro-batch step together. The blocks that are here in one step stand one behind the
other in one buffer, ring by ring. In the backward pass gradients of keys and values follow their
block: what was computed in step j is sent in step j + 1, and after step N - 1 on to the owner. A
ring of N ranks therefore has a last *homecoming* step N without computation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.plan.records import Piece
from parallel.plan.rings import Ring


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Queries that all see the same keys, and all of these."""

    queries: slice
    """Rows of this rank's shared tokens."""
    keys: slice
    """Rows of the step's buffer."""

    @property
    def num_queries(self) -> int:
        return int(self.queries.stop - self.queries.start)

    @property
    def num_keys(self) -> int:
        return int(self.keys.stop - self.keys.start)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One ring's block in one step, as it arrives and as it left."""

    next_rank: int
    previous_rank: int
    sent: slice
    """Rows of the buffer of the step before."""
    received: slice
    """Rows of the buffer of this step."""


@dataclass(frozen=True, slots=True)
class Homecoming:
    """Gradients that reach their owner in this step."""

    received: slice
    """Rows of the buffer of this step."""
    own: slice
    """Rows of this rank's shared tokens."""


@dataclass(frozen=True, slots=True)
class RingStep:
    """Step j >= 1 of all rings of a micro-batch."""

    transfers: tuple[Transfer, ...]
    """Of the rings that compute in this step."""
    homecoming_transfers: tuple[Transfer, ...]
    """Of the rings that have computed all, and whose gradients go home."""
    homecomings: tuple[Homecoming, ...]
    rectangles: tuple[Rectangle, ...]
    num_keys: int
    """Rows of the buffer that hold blocks; those of homecomings stand behind them."""
    num_rows: int
    """All rows of the buffer."""


def ring_steps(
    rings: Sequence[Ring], *, rank: int, first_rows: Sequence[int]
) -> tuple[RingStep, ...]:
    """Steps 1.. of a rank's rings, the last homecoming included.

    first_rows: where each ring's rows begin among the rank's shared tokens.
    """
    places = [_Place(ring, ring.position(rank)) for ring in rings]
    num_steps = max((len(ring.ranks) for ring in rings), default=0)
    before = _buffer_rows(places, step=0)
    steps = []
    for step in range(1, num_steps + 1):
        here = _buffer_rows(places, step=step)
        transfers, homecoming_transfers, homecomings = [], [], []
        rectangles: list[Rectangle] = []
        for number, rows in here.items():
            place, first_row = places[number], first_rows[number]
            transfer = Transfer(
                next_rank=place.rank_at(1),
                previous_rank=place.rank_at(-1),
                sent=before[number],
                received=rows,
            )
            if step < place.size:
                transfers.append(transfer)
                queries, keys = place.pieces_of(0), place.pieces_of(step)
                rectangles += _rectangles(
                    queries, keys, first_query=first_row, first_key=rows.start
                )
            else:
                homecoming_transfers.append(transfer)
                own = slice(first_row, first_row + rows.stop - rows.start)
                homecomings.append(Homecoming(rows, own))
        steps.append(
            RingStep(
                tuple(transfers),
                tuple(homecoming_transfers),
                tuple(homecomings),
                tuple(rectangles),
                num_keys=max((transfer.received.stop for transfer in transfers), default=0),
                num_rows=max(rows.stop for rows in here.values()),
            )
        )
        before = here
    return tuple(steps)


def own_rows(
    rings: Sequence[Ring], *, rank: int, first_rows: Sequence[int]
) -> tuple[tuple[slice, slice], ...]:
    """For each ring (rows among the rank's shared tokens, rows in the buffer of step 0)."""
    buffer_rows = _buffer_rows([_Place(ring, ring.position(rank)) for ring in rings], step=0)
    return tuple(
        (slice(first_row, first_row + rows.stop - rows.start), rows)
        for first_row, rows in zip(first_rows, buffer_rows.values(), strict=True)
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """A rank's place in a ring."""

    ring: Ring
    position: int

    @property
    def size(self) -> int:
        return len(self.ring.ranks)

    def rank_at(self, distance: int) -> int:
        return self.ring.ranks[(self.position + distance) % self.size]

    def pieces_of(self, step: int) -> Sequence[Sequence[Piece]]:
        """Those whose keys are here in a step."""
        return self.ring.pieces[(self.position - step) % self.size]

    def num_keys(self, step: int) -> int:
        return self.ring.num_tokens((self.position - step) % self.size)


def _buffer_rows(places: Sequence[_Place], *, step: int) -> dict[int, slice]:
    """Rows of each ring's block in the buffer of a step: those that compute, then homecomings."""
    computing = [number for number, place in enumerate(places) if place.size > step]
    returning = [number for number, place in enumerate(places) if place.size == step]
    rows, first = {}, 0
    for number in computing + returning:
        end = first + places[number].num_keys(step)
        rows[number] = slice(first, end)
        first = end
    return rows


def _rectangles(
    query_pieces: Sequence[Sequence[Piece]],
    key_pieces: Sequence[Sequence[Piece]],
    *,
    first_query: int,
    first_key: int,
) -> Iterator[Rectangle]:
    """What two different ranks' pieces of a ring's sequences see of each other."""
    for queries, keys in zip(query_pieces, key_pieces, strict=True):
        # Queries from `start` on see the first `num_visible` keys; a later piece sees no fewer.
        start = end = first_query
        num_visible = 0
        for piece in queries:
            visible = sum(key.num_tokens for key in keys if key.end <= piece.start)
            if visible > num_visible:
                if num_visible and end > start:
                    yield Rectangle(slice(start, end), slice(first_key, first_key + num_visible))
                start, num_visible = end, visible
            end += piece.num_tokens
        if num_visible and end > start:
            yield Rectangle(slice(start, end), slice(first_key, first_key + num_visible))
        first_query = end
        first_key += sum(key.num_tokens for key in keys)
