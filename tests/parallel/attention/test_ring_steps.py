"""The numbers of a ring pass, without any process: what is seen, what travels, what comes home."""

from itertools import accumulate, product

import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.attention.record_tensors import moved
from parallel.attention.ring_steps import RingStep, own_rows, ring_steps
from parallel.attention.shared_rows import SharedRows, shared_rows
from parallel.plan.cuts import even_cut
from parallel.plan.records import MicroBatch, Piece, StepPlan
from parallel.plan.rings import RowLayout, row_layouts
from tests.parallel.attention.shared_case import exchanging_heads

Token = tuple[int, int]
"""(sequence, position)"""
CPU = torch.device("cpu")


def _layouts(pieces: list[list[Piece]]) -> list[RowLayout]:
    ends: dict[int, int] = {}
    for piece in (piece for mine in pieces for piece in mine):
        ends[piece.sequence] = max(piece.end, ends.get(piece.sequence, 0))
    lengths = tuple(ends.get(sequence, 0) for sequence in range(1 + max(ends, default=-1)))
    batches = tuple((MicroBatch(tuple(mine)),) for mine in pieces)
    plan = StepPlan(lengths, sum(lengths), batches)
    plan.check()
    return [row_layouts(plan, rank)[0] for rank in range(len(pieces))]


def _tokens(layout: RowLayout) -> list[Token]:
    """Of each shared row."""
    pieces = layout.pieces[len(layout.whole) :]
    return [(p.sequence, position) for p in pieces for position in range(p.start, p.end)]


class _Rank:
    """One rank's ring pass with tokens in place of their keys."""

    def __init__(self, layout: RowLayout) -> None:
        sizes = [ring.num_tokens(ring.position(layout.rank)) for ring in layout.rings]
        first_rows = list(accumulate(sizes, initial=0))[:-1]
        self.rows = _tokens(layout)
        self.own_rows = own_rows(layout.rings, rank=layout.rank, first_rows=first_rows)
        self.steps = ring_steps(layout.rings, rank=layout.rank, first_rows=first_rows)
        self.held: list[Token] = []
        for mine, place in self.own_rows:
            assert place.start == len(self.held)
            self.held += self.rows[mine]
        self.seen: set[tuple[Token, Token]] = set()
        # Step 0: own rows of a sequence, each sees itself and those before it.
        for query, key in product(enumerate(self.rows), repeat=2):
            if query[1][0] == key[1][0] and key[0] <= query[0]:
                self.see(query[1], key[1])

    def see(self, query: Token, key: Token) -> None:
        assert (query, key) not in self.seen, "seen twice"
        self.seen.add((query, key))

    def step(self, number: int) -> RingStep | None:
        return self.steps[number - 1] if number <= len(self.steps) else None


def _run(layouts: list[RowLayout]) -> list[_Rank]:
    """Let blocks go round as the steps say; check that both ends of each message agree."""
    ranks = [_Rank(layout) for layout in layouts]
    for number in range(1, 1 + max(len(rank.steps) for rank in ranks)):
        sent: dict[tuple[int, int], list[list[Token]]] = {}
        for me, rank in enumerate(ranks):
            if step := rank.step(number):
                for transfer in step.transfers + step.homecoming_transfers:
                    block = rank.held[transfer.sent]
                    sent.setdefault((me, transfer.next_rank), []).append(block)
        for me, rank in enumerate(ranks):
            if not (step := rank.step(number)):
                continue
            rank.held = [(-1, -1)] * step.num_rows
            for transfer in step.transfers + step.homecoming_transfers:
                # Between two ranks messages arrive in the order in which they were sent.
                block = sent[transfer.previous_rank, me].pop(0)
                rank.held[transfer.received] = block
                assert len(rank.held) == step.num_rows, "a block has another size than its place"
            assert (-1, -1) not in rank.held
            for rectangle in step.rectangles:
                for query in rank.rows[rectangle.queries]:
                    for key in rank.held[: step.num_keys][rectangle.keys]:
                        rank.see(query, key)
            for home in step.homecomings:
                assert rank.held[home.received] == rank.rows[home.own]
        assert not any(sent.values()), "a message nobody waits for"
    return ranks


@st.composite
def _random_pieces(draw: st.DrawFn) -> list[list[Piece]]:
    num_ranks = draw(st.integers(1, 5))
    pieces: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for sequence in range(draw(st.integers(1, 4))):
        position = 0
        for _ in range(draw(st.integers(1, 8))):
            rank, length = draw(st.integers(0, num_ranks - 1)), draw(st.integers(1, 4))
            pieces[rank].append(Piece(sequence, position, position + length))
            position += length
    return pieces


@given(_random_pieces())
def test_each_token_sees_itself_and_those_before_it_once(pieces: list[list[Piece]]) -> None:
    for rank in _run(_layouts(pieces)):
        expected = set()
        for query in rank.rows:
            expected |= {(query, (query[0], position)) for position in range(query[1] + 1)}
        assert rank.seen == expected


def test_head_to_tail_gives_one_rectangle_a_step_and_all_the_same_work() -> None:
    num_ranks, length = 4, 64
    pieces = [list(mine) for mine in even_cut(0, length, num_ranks)]
    for rank in _run(_layouts(pieces)):
        assert [len(step.rectangles) for step in rank.steps] == [1, 1, 1, 0]
        assert {
            block.num_queries * block.num_keys for step in rank.steps for block in step.rectangles
        } == {length // num_ranks * (length // (2 * num_ranks))}


@given(_random_pieces())
def test_gathered_rows_are_those_of_the_rectangles(pieces: list[list[Piece]]) -> None:
    for layout in _layouts(pieces):
        rows = shared_rows(layout, device=CPU)
        for step, rectangles in zip(rows.steps, rows.rectangles, strict=True):
            sides = (
                ([b.queries for b in step.rectangles], rectangles.query_rows),
                ([b.keys for b in step.rectangles], rectangles.key_rows),
            )
            for ranges, found in sides:
                expected = [row for part in ranges for row in range(part.start, part.stop)]
                if isinstance(found, slice):
                    assert list(range(found.start, found.stop)) == expected
                else:
                    assert found.tolist() == expected
            queries = rectangles.query_cu_seqlens.diff().tolist()
            keys = rectangles.key_cu_seqlens.diff().tolist()
            assert queries == [block.num_queries for block in step.rectangles]
            assert keys == [block.num_keys for block in step.rectangles]
            assert rectangles.max_queries == max(queries, default=0)
            assert rectangles.max_keys == max(keys, default=0)


@given(_random_pieces())
def test_whole_sequences_in_order_and_back(pieces: list[list[Piece]]) -> None:
    layouts = _layouts(pieces)
    every_ring = {ring.ranks for layout in layouts for ring in layout.rings}
    layouts = [exchanging_heads(layout, every_ring) for layout in layouts]
    for layout in layouts:
        rows = shared_rows(layout, device=CPU)
        assert not rows.own_rows
        assert not rows.steps
        for ring, exchanged in zip(layout.rings, rows.ulysses, strict=True):
            arrived: list[Token] = []
            for rank, place in zip(ring.ranks, exchanged.member_rows, strict=True):
                theirs = shared_rows(layouts[rank], device=CPU)
                (same,) = (x for x in theirs.ulysses if x.ranks == ring.ranks)
                assert place.start == len(arrived)
                arrived += _tokens(layouts[rank])[same.own]
            ordered = [arrived[row] for row in exchanged.source.tolist()]
            assert [ordered[row] for row in exchanged.target.tolist()] == arrived
            position = 0
            for start, end in exchanged.documents.ranges:
                assert [p for _, p in ordered[start:end]] == list(range(end - start))
                position = end
            assert position == len(ordered)


def test_all_tensors_go_to_the_device_together() -> None:
    """The meta device stands for an accelerator; moved back, nothing has changed."""
    pieces = [list(mine) for mine in even_cut(0, 20, 3)]
    pieces[0] += [Piece(1, 0, 7)]
    pieces[1] += [Piece(2, 0, 3)]
    pieces[0] += [Piece(2, 3, 6)]
    for ulysses in ((), ((0, 1, 2),)):
        layout = exchanging_heads(_layouts(pieces)[0], ulysses)
        rows = shared_rows(layout, device=CPU)
        there = shared_rows(layout, device=torch.device("meta"))
        assert there.whole.device_cu_seqlens.device.type == "meta"
        assert there.steps == rows.steps
        assert there.num_rows == rows.num_rows
        copied = moved(rows, CPU)
        assert isinstance(copied, SharedRows)
        assert str(copied) == str(rows)
