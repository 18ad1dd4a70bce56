"""Attention over shared sequences on real ranks against the formula over whole sequences."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.attention.block import Attended, Gradients
from parallel.attention.block_varlen import VarlenBlocks
from parallel.attention.local import Backend
from parallel.attention.reference import reference_block, reference_block_backward
from parallel.attention.shared_pass import SharedPass
from parallel.attention.shared_rows import SharedRows
from parallel.comm.exchange import Exchange
from tests.parallel.attention.packed_case import yardsticks
from tests.parallel.attention.shared_case import (
    SharedCase,
    check,
    cut_case,
    head_tail_case,
    on_rank,
    together,
)
from tests.rank_pool import Ranks

HEAD_TAIL = (
    head_tail_case("one sequence on two", {(0, 1): (64,)}),
    head_tail_case("with whole documents", {(0, 1): (300, 37), (0,): (41,), (1,): (7,)}, padding=3),
    head_tail_case("every head has a key of its own", {(0, 1): (90,)}, heads=(3, 3, 33)),
    head_tail_case("one key for all heads", {(0, 1, 2): (100, 50)}, heads=(4, 1, 16)),
    head_tail_case("one head", {(0, 1): (30, 51), (1,): (5,)}, heads=(1, 1, 16)),
    head_tail_case("more ranks than tokens", {(0, 1, 2, 3): (5, 1, 3, 2)}, padding=1),
    head_tail_case("two rings of one size", {(0, 1): (80,), (2, 3): (60, 9), (1,): (30,)}),
    head_tail_case("rings that overlap", {(0, 1): (80,), (1, 2): (60,), (2, 0): (33, 5)}),
    head_tail_case("the same ranks in another order", {(0, 1, 2): (80,), (2, 0, 1): (60,)}),
    head_tail_case(
        "rings of all sizes", {(0, 1, 2, 3): (200,), (1, 3): (60,), (0, 3, 2): (33, 70)}
    ),
    head_tail_case("a rank that shares nothing", {(0, 2): (50,), (1,): (20,)}),
)
UNEVEN = (
    cut_case("most on one rank", ((0, 3), (1, 80), (0, 1))),
    cut_case("head and no tail", ((1, 40), (0, 40))),
    cut_case("alternating", ((0, 5), (1, 9), (0, 1), (1, 1), (0, 30), (1, 2))),
    cut_case("three of unequal size", ((2, 7), (0, 1), (1, 50), (0, 12), (2, 1)), ((1, 4), (0, 9))),
    cut_case("one rank, two pieces", ((0, 7), (0, 8)), ((0, 5), (1, 6))),
)
ULYSSES = (
    head_tail_case("two", {(0, 1): (120, 9), (0,): (20,)}, padding=2, ulysses=((0, 1),)),
    head_tail_case("four", {(0, 1, 2, 3): (90, 41, 1)}, heads=(8, 4, 8), ulysses=((0, 1, 2, 3),)),
    head_tail_case("beside a ring", {(0, 1): (70, 5), (0, 1, 2): (80,)}, ulysses=((0, 1),)),
    head_tail_case(
        "rings on both sides",
        {(0, 1): (40,), (0, 2): (33, 3), (0, 2, 3): (50,), (1, 2): (60,), (3, 1): (21,)},
        ulysses=((0, 2), (1, 2)),
    ),
    cut_case("uneven", ((0, 3), (1, 80), (0, 1)), heads=(2, 2, 8), ulysses=((0, 1),)),
    cut_case("pieces", ((1, 3), (0, 8), (1, 1), (0, 9)), heads=(6, 2, 8), ulysses=((1, 0),)),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "cases", [HEAD_TAIL, UNEVEN, ULYSSES], ids=["head to tail", "uneven", "ulysses"]
)
def test_as_good_as_its_precision(
    ranks: Ranks, cases: tuple[SharedCase, ...], dtype: torch.dtype
) -> None:
    check(ranks, cases, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["blocked", "torch_flash", "reference"])
def test_every_backend(ranks: Ranks, backend: Backend, dtype: torch.dtype) -> None:
    cases = (HEAD_TAIL[1], HEAD_TAIL[2], HEAD_TAIL[7], ULYSSES[2], UNEVEN[3])
    check(ranks, [replace(case, backend=backend) for case in cases], dtype)


def test_large_rings(ranks: Ranks) -> None:
    case = head_tail_case(
        "six ranks", {tuple(range(6)): (143, 29), (3, 4): (40,), (5, 2, 0): (70,), (5,): (9,)}
    )
    check(ranks, [case], torch.float32)


def _varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    softmax_scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """What the kernels of accelerators compute, in the formula's words."""
    outputs, log_sum_exps = [], []
    for queries, keys in _segments(query, key, cu_seqlens, max_seqlens):
        output, log_sum_exp = reference_block(
            query[queries],
            key[keys],
            value[keys],
            softmax_scale=softmax_scale,
            is_causal=is_causal,
        )
        outputs.append(output.flatten(0, 1).transpose(0, 1))
        log_sum_exps.append(log_sum_exp.flatten(0, 1))
    return torch.cat(outputs).to(query.dtype), torch.cat(log_sum_exps, dim=1)


def _varlen_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    *,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    softmax_scale: float,
    is_causal: bool,
) -> Gradients:
    groups, dtype = key.shape[1], query.dtype
    found = []
    for queries, keys in _segments(query, key, cu_seqlens, max_seqlens):
        length = queries.stop - queries.start
        grad_query, grad_key, grad_value = reference_block_backward(
            grad_output[queries],
            query[queries],
            key[keys],
            value[keys],
            output[queries],
            log_sum_exp[:, queries].reshape(groups, query.shape[1] // groups, length),
            softmax_scale=softmax_scale,
            is_causal=is_causal,
        )
        found.append((grad_query.flatten(0, 1).transpose(0, 1), grad_key, grad_value))
    query_grads, key_grads, value_grads = zip(*found, strict=True)
    return (
        torch.cat(query_grads).to(dtype),
        torch.cat(key_grads).to(dtype),
        torch.cat(value_grads).to(dtype),
    )


def _segments(
    query: Tensor,
    key: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
) -> list[tuple[slice, slice]]:
    borders = [x.tolist() for x in cu_seqlens]
    for border, rows, longest in zip(borders, (query, key), max_seqlens, strict=True):
        assert border[-1] == len(rows)
        assert longest == max(end - start for start, end in pairwise(border))
    ranges = [[slice(start, end) for start, end in pairwise(border)] for border in borders]
    return list(zip(*ranges, strict=True))


def _with_varlen_kernels(
    case: SharedCase, rows: SharedRows, tensors: tuple[Tensor, Tensor, Tensor], grad: Tensor
) -> list[Tensor]:
    query, key, value = tensors
    kernels = VarlenBlocks(_varlen_forward, _varlen_backward, case.packed.softmax_scale)
    shared_pass = SharedPass(rows, Exchange(None), kernels)
    answer = shared_pass.forward(query, key, value)
    attended = Attended(grad, query, answer.output, answer.log_sum_exp)
    return [answer.output, *shared_pass.backward(attended, key, value, answer.heads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_varlen_call_a_step(ranks: Ranks, dtype: torch.dtype) -> None:
    """What accelerators do, with the formula in the flash kernel's place."""
    check(ranks, HEAD_TAIL + UNEVEN + ULYSSES, dtype, _with_varlen_kernels)


@st.composite
def _random_cases(draw: st.DrawFn) -> SharedCase:
    num_ranks = draw(st.integers(2, 4))
    cut = st.tuples(st.integers(0, num_ranks - 1), st.integers(0, 25))
    sequences = draw(st.lists(st.lists(cut, min_size=1, max_size=7), min_size=1, max_size=4))
    groups, per_group = draw(st.sampled_from((1, 2, 4))), draw(st.integers(1, 3))
    head_dim, padding = draw(st.sampled_from((3, 8))), draw(st.integers(0, 2))
    # The last rank has something to do, so that it exists.
    cuts = [*(tuple(cuts) for cuts in sequences), ((num_ranks - 1, 1),)]
    case = cut_case("random", *cuts, heads=(groups * per_group, groups, head_dim), padding=padding)
    allowed = sorted(ring for ring in case.rings if groups % len(ring) == 0)
    exchanging = draw(st.lists(st.sampled_from(allowed), unique=True)) if allowed else []
    return replace(case, ulysses_rings=tuple(exchanging))


@given(cases=st.lists(_random_cases(), min_size=1, max_size=12))
@settings(max_examples=10)
def test_any_pieces_equal_the_formula_in_float64(ranks: Ranks, cases: list[SharedCase]) -> None:
    found = ranks.run(4, on_rank, cases, torch.float64)
    for number, case in enumerate(cases):
        answer = together(case, [results[number] for results in found])
        for mine, exact in zip(answer, yardsticks(case.packed, torch.float64).exact, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)
