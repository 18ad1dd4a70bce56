"""Attention problems whose sequences several ranks share, and their answers put together again."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.attention.local import Backend
from parallel.attention.packed import packed_attention
from parallel.attention.shared_rows import SharedRows, shared_rows
from parallel.comm.exchange import Exchange
from parallel.plan.cuts import even_cut
from parallel.plan.records import MicroBatch, Piece, StepPlan
from parallel.plan.rings import RowLayout, row_layouts
from tests.parallel.attention.packed_case import PackedCase, assert_as_good_as_plain, yardsticks
from tests.rank_pool import Ranks


def exchanging_heads(layout: RowLayout, ranks: Collection[tuple[int, ...]]) -> RowLayout:
    """The layout with the rings of these ranks, and no others, exchanging heads."""
    rings = tuple(replace(ring, is_ulysses=ring.ranks in ranks) for ring in layout.rings)
    return replace(layout, rings=rings)


@dataclass(frozen=True, slots=True)
class SharedCase:
    """Sequences and, for each rank, its pieces of them; one micro-batch a rank."""

    packed: PackedCase
    """The sequences in one row; its padding goes to every rank."""
    pieces: tuple[tuple[Piece, ...], ...]
    ulysses_rings: tuple[tuple[int, ...], ...] = ()
    backend: Backend = "auto"

    @property
    def num_ranks(self) -> int:
        return len(self.pieces)

    @property
    def rings(self) -> set[tuple[int, ...]]:
        """The ranks of each."""
        return {ring.ranks for rank in range(self.num_ranks) for ring in self.layout(rank).rings}

    def layout(self, rank: int) -> RowLayout:
        plan = StepPlan(
            lengths=self.packed.lengths,
            tokens_per_rank=sum(self.packed.lengths),
            micro_batches=tuple((MicroBatch(pieces),) for pieces in self.pieces),
        )
        plan.check()
        return exchanging_heads(row_layouts(plan, rank)[0], self.ulysses_rings)

    def indices(self, rank: int) -> Tensor:
        """For each row of a rank but padding, its place in the row of all sequences."""
        starts = self.packed.cu_seqlens
        parts = [
            torch.arange(starts[piece.sequence] + piece.start, starts[piece.sequence] + piece.end)
            for piece in self.layout(rank).pieces
        ]
        return torch.cat([torch.empty(0, dtype=torch.long), *parts])


def head_tail_case(
    name: str,
    rings: dict[tuple[int, ...], tuple[int, ...]],
    *,
    heads: tuple[int, int, int] = (4, 2, 16),
    padding: int = 0,
    ulysses: tuple[tuple[int, ...], ...] = (),
) -> SharedCase:
    """A case from {ranks: lengths of the sequences that these ranks share}, cut head to tail."""
    lengths = tuple(length for shared in rings.values() for length in shared)
    members = [ranks for ranks, shared in rings.items() for _ in shared]
    pieces: list[list[Piece]] = [[] for _ in range(1 + max(map(max, members)))]
    for sequence, (length, ranks) in enumerate(zip(lengths, members, strict=True)):
        for rank, mine in zip(ranks, even_cut(sequence, length, len(ranks)), strict=True):
            pieces[rank] += mine
    packed = PackedCase(name, lengths, *heads, padding=padding)
    return SharedCase(packed, tuple(tuple(mine) for mine in pieces), ulysses)


def cut_case(
    name: str,
    *sequences: tuple[tuple[int, int], ...],
    heads: tuple[int, int, int] = (2, 1, 8),
    padding: int = 2,
    ulysses: tuple[tuple[int, ...], ...] = (),
) -> SharedCase:
    """A case from sequences as (rank, number of tokens) of each piece from head to tail."""
    num_ranks = 1 + max(rank for cuts in sequences for rank, _ in cuts)
    pieces: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for sequence, cuts in enumerate(sequences):
        position = 0
        for rank, num_tokens in cuts:
            if num_tokens:
                pieces[rank].append(Piece(sequence, position, position + num_tokens))
            position += num_tokens
    lengths = tuple(sum(tokens for _, tokens in cuts) for cuts in sequences)
    packed = PackedCase(name, lengths, *heads, padding=padding)
    return SharedCase(packed, tuple(tuple(mine) for mine in pieces), ulysses)


Attention = Callable[[SharedCase, SharedRows, tuple[Tensor, Tensor, Tensor], Tensor], list[Tensor]]
"""From query, key, value and the gradient of the output: output and three gradients."""


def public_call(
    case: SharedCase, rows: SharedRows, tensors: tuple[Tensor, Tensor, Tensor], grad: Tensor
) -> list[Tensor]:
    """`packed_attention` and autograd."""
    query, key, value = (x.requires_grad_() for x in tensors)
    output = packed_attention(
        query,
        key,
        value,
        rows=rows,
        exchange=Exchange(None),
        softmax_scale=case.packed.softmax_scale,
        backend=case.backend,
    )
    leaves = (query, key, value)
    # With padding alone a leaf may not be used at all.
    grads = torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)
    return [output.detach(), *grads]


def on_rank(
    cases: Sequence[SharedCase], dtype: torch.dtype, attention: Attention = public_call
) -> list[list[Tensor]]:
    """Run in every rank: output and gradients of its rows, padding included, case by case."""
    rank = torch.distributed.get_rank()
    return [_results(case, rank, dtype, attention) for case in cases]


def _results(case: SharedCase, rank: int, dtype: torch.dtype, attention: Attention) -> list[Tensor]:
    if rank >= case.num_ranks:
        return []
    own = case.indices(rank)
    # What stands in padding must not matter.
    query, key, value, grad = (
        torch.cat((x.detach()[own], x.new_full((case.packed.padding, *x.shape[1:]), torch.nan)))
        for x in case.packed.tensors(dtype=dtype)
    )
    rows = shared_rows(case.layout(rank), device=torch.device("cpu"))
    return attention(case, rows, (query, key, value), grad)


def together(case: SharedCase, found: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What the ranks found, in the order of `case.packed`; padding must be zero."""
    whole = []
    for number in range(4):
        parts = [results[number] for results in found[: case.num_ranks]]
        answer = parts[0].new_full((case.packed.num_tokens, *parts[0].shape[1:]), torch.nan)
        answer[case.packed.cu_seqlens[-1] :] = 0
        for rank, part in enumerate(parts):
            own = case.indices(rank)
            assert not part[len(own) :].any(), f"rank {rank} left something in its padding"
            answer[own] = part[: len(own)]
        whole.append(answer)
    return whole


def check(ranks: Ranks, cases: Sequence[SharedCase], dtype: torch.dtype, *args: Attention) -> None:
    """The answers of real ranks are as good as their precision lets attention be."""
    num_ranks = max(case.num_ranks for case in cases)
    found = ranks.run(num_ranks, on_rank, cases, dtype, *args)
    for number, case in enumerate(cases):
        answer = together(case, [results[number] for results in found])
        assert [x.dtype for x in answer] == [dtype] * 4
        what = f"{case.packed.name}, {case.backend}, Ulysses {case.ulysses_rings}"
        assert_as_good_as_plain(answer, yardsticks(case.packed, dtype), what=what)
