"""Ring attention on real ranks against the formula over whole sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.plan.records import Piece
from tests.parallel.attention.packed_case import PackedCase, assert_as_good_as_plain, yardsticks
from tests.parallel.attention.shared_case import SharedCase, head_tail, on_rank, together
from tests.rank_pool import Ranks


def _head_tail(
    name: str,
    rings: dict[tuple[int, ...], tuple[int, ...]],
    *,
    heads: tuple[int, int, int] = (4, 2, 16),
    padding: int = 0,
) -> SharedCase:
    """A case from {ranks: lengths of the sequences that these ranks share}."""
    lengths = tuple(length for shared in rings.values() for length in shared)
    members = [ranks for ranks, shared in rings.items() for _ in shared]
    num_ranks = 1 + max(rank for ranks in members for rank in ranks)
    packed = PackedCase(name, lengths, *heads, padding=padding)
    return SharedCase(packed, head_tail(lengths, members, num_ranks))


def _cut(name: str, *sequences: tuple[tuple[int, int], ...]) -> SharedCase:
    """A case from sequences as (rank, number of tokens) of each piece from head to tail."""
    pieces: list[list[Piece]] = [
        [] for _ in range(1 + max(rank for cuts in sequences for rank, _ in cuts))
    ]
    for sequence, cuts in enumerate(sequences):
        position = 0
        for rank, num_tokens in cuts:
            if num_tokens:
                pieces[rank].append(Piece(sequence, position, position + num_tokens))
            position += num_tokens
    lengths = tuple(sum(tokens for _, tokens in cuts) for cuts in sequences)
    return SharedCase(
        PackedCase(name, lengths, 2, 1, 8, padding=2), tuple(tuple(mine) for mine in pieces)
    )


HEAD_TAIL = (
    _head_tail("one sequence on two", {(0, 1): (64,)}),
    _head_tail("with whole documents", {(0, 1): (300, 37), (0,): (41,), (1,): (7,)}, padding=3),
    _head_tail("every rank has a key of its own", {(0, 1): (90,)}, heads=(3, 3, 33)),
    _head_tail("one key for all heads", {(0, 1, 2): (100, 50)}, heads=(4, 1, 16)),
    _head_tail("more ranks than tokens", {(0, 1, 2, 3): (5, 1, 3, 2)}, padding=1),
    _head_tail("two rings of one size", {(0, 1): (80,), (2, 3): (60, 9), (1,): (30,)}),
    _head_tail("rings that overlap", {(0, 1): (80,), (1, 2): (60,), (2, 0): (33, 5)}),
    _head_tail("the same ranks in another order", {(0, 1, 2): (80,), (2, 0, 1): (60,)}),
    _head_tail("rings of all sizes", {(0, 1, 2, 3): (200,), (1, 3): (60,), (0, 3, 2): (33, 70)}),
    _head_tail("a rank that shares nothing", {(0, 2): (50,), (1,): (20,)}),
    _head_tail("five ranks", {tuple(range(5)): (143, 29), (3, 4): (40,), (2,): (9,)}),
)
UNEVEN = (
    _cut("most on one rank", ((0, 3), (1, 80), (0, 1))),
    _cut("head and no tail", ((1, 40), (0, 40))),
    _cut("alternating", ((0, 5), (1, 9), (0, 1), (1, 1), (0, 30), (1, 2))),
    _cut("three of unequal size", ((2, 7), (0, 1), (1, 50), (0, 12), (2, 1)), ((1, 4), (0, 9))),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cases", [HEAD_TAIL, UNEVEN], ids=["head to tail", "uneven"])
def test_as_good_as_its_precision(
    ranks: Ranks, cases: tuple[SharedCase, ...], dtype: torch.dtype
) -> None:
    num_ranks = max(case.num_ranks for case in cases)
    found = ranks.run(num_ranks, on_rank, cases, dtype)
    for number, case in enumerate(cases):
        answer = together(case, [results[number] for results in found])
        assert [x.dtype for x in answer] == [dtype] * 4
        assert_as_good_as_plain(answer, yardsticks(case.packed, dtype), what=case.packed.name)


@st.composite
def _random_cases(draw: st.DrawFn) -> SharedCase:
    num_ranks = draw(st.integers(2, 4))
    cut = st.tuples(st.integers(0, num_ranks - 1), st.integers(0, 25))
    sequences = draw(st.lists(st.lists(cut, min_size=1, max_size=7), min_size=1, max_size=4))
    case = _cut("random", *(tuple(cuts) for cuts in sequences), ((num_ranks - 1, 1),))
    groups, per_group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    packed = PackedCase(
        "random",
        case.packed.lengths,
        groups * per_group,
        groups,
        draw(st.sampled_from((3, 8))),
        padding=draw(st.integers(0, 2)),
    )
    return SharedCase(packed, case.pieces)


@given(cases=st.lists(_random_cases(), min_size=1, max_size=12))
@settings(max_examples=12)
def test_any_pieces_equal_the_formula_in_float64(ranks: Ranks, cases: list[SharedCase]) -> None:
    found = ranks.run(4, on_rank, cases, torch.float64)
    for number, case in enumerate(cases):
        answer = together(case, [results[number] for results in found])
        for mine, exact in zip(answer, yardsticks(case.packed, torch.float64).exact, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)
