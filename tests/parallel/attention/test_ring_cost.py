"""What attention over shared sequences sends, keeps and reuses, on real ranks."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from parallel.attention.packed import packed_attention
from parallel.attention.shared_rows import shared_rows
from parallel.comm.exchange import Exchange
from tests.parallel.attention.packed_case import Attention, plain_attention
from tests.parallel.attention.shared_case import SharedCase, cut_case, head_tail_case, together
from tests.rank_pool import Ranks

CPU = torch.device("cpu")
THREE = cut_case("three", ((0, 5), (1, 50), (2, 9), (0, 3)), heads=(4, 2, 8), padding=1)
FOUR = head_tail_case("four", {(0, 1, 2, 3): (90, 41)}, heads=(8, 4, 8))


def _own_tensors(case: SharedCase, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value (requiring gradients) and the gradient of this rank's rows."""
    own = case.indices(dist.get_rank())
    padding = torch.zeros(case.packed.padding, dtype=torch.long)
    rows = torch.cat((own, padding))
    tensors = [x.detach()[rows] for x in case.packed.tensors(dtype=dtype)]
    return [x.requires_grad_() for x in tensors[:3]] + tensors[3:]


def _bytes_sent(case: SharedCase, dtype: torch.dtype) -> tuple[int, int]:
    """By forward and by backward."""
    query, key, value, grad = _own_tensors(case, dtype)
    layout = case.layout(dist.get_rank())
    rows = shared_rows(layout, device=CPU)
    exchange = Exchange(None)
    output = packed_attention(query, key, value, rows=rows, exchange=exchange)
    forward = exchange.traffic.num_bytes_sent
    torch.autograd.backward(output, grad)
    return forward, exchange.traffic.num_bytes_sent - forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_ring_sends_keys_and_values_and_their_gradients_in_float32(
    ranks: Ranks, dtype: torch.dtype
) -> None:
    found = ranks.run(3, _bytes_sent, THREE, dtype)
    num_tokens = [8, 50, 9]
    numbers = 2 * THREE.packed.num_query_groups * THREE.packed.head_dim
    for rank, (forward, backward) in enumerate(found):
        # Blocks of this rank and the one before it go on; gradients of all but this rank's.
        blocks = numbers * (num_tokens[rank] + num_tokens[rank - 1]) * dtype.itemsize
        gradients = numbers * (sum(num_tokens) - num_tokens[rank]) * 4
        assert forward == blocks
        assert backward == blocks + gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_exchange_of_heads_sends_each_number_once(ranks: Ranks, dtype: torch.dtype) -> None:
    exchanging = SharedCase(FOUR.packed, FOUR.pieces, ulysses_rings=((0, 1, 2, 3),))
    found = ranks.run(4, _bytes_sent, exchanging, dtype)
    total = sum(FOUR.packed.lengths)
    for rank, sent in enumerate(found):
        own = len(FOUR.indices(rank))
        # A quarter of the heads of own rows to each of three, and outputs of their rows back.
        to_heads, to_rows = 3 * own, total - own
        query_side, key_side = 8 * 8 * dtype.itemsize // 4, 2 * 4 * 8 * dtype.itemsize // 4
        forward = to_heads * (query_side + key_side) + to_rows * query_side
        backward = to_heads * query_side + to_rows * (query_side + key_side)
        assert sent == (forward, backward)


def _saved_for_backward(case: SharedCase) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    query, key, value, _ = _own_tensors(case, torch.bfloat16)
    rows = shared_rows(case.layout(dist.get_rank()), device=CPU)
    saved: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def pack(x: Tensor) -> Tensor:
        saved.append((x.dtype, tuple(x.shape)))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        packed_attention(query, key, value, rows=rows, exchange=Exchange(None))
    return saved


def test_only_inputs_output_and_log_sum_exp_are_kept(ranks: Ranks) -> None:
    """Nothing of other ranks: the memory of a shared sequence is shared, too."""
    for num_tokens, saved in zip((8, 50, 9), ranks.run(3, _saved_for_backward, THREE), strict=True):
        query, key = (num_tokens + 1, 4, 8), (num_tokens + 1, 2, 8)
        half = torch.bfloat16
        expected = [(half, query), (half, key), (half, key), (half, query)]
        assert saved == [*expected, (torch.float32, (4, num_tokens))]


def test_heads_that_are_exchanged_are_kept_once(ranks: Ranks) -> None:
    """Not as this rank's rows of all heads, too: of those only whole sequences are."""
    ring = (0, 1, 2, 3)
    both = cut_case(
        "both", *(((rank, 7),) for rank in ring), ((0, 9), (1, 4), (2, 9), (3, 2)), heads=(8, 4, 8)
    )
    half = torch.bfloat16
    for case, num_whole in ((FOUR, 0), (both, 7)):
        exchanging = SharedCase(case.packed, case.pieces, ulysses_rings=(ring,))
        for rank, saved in enumerate(ranks.run(4, _saved_for_backward, exchanging)):
            own, shared = len(case.indices(rank)), sum(case.packed.lengths) - 4 * num_whole
            query, key, value, output, log_sum_exp, *heads = saved
            assert query == (half, (num_whole, 8, 8))
            assert key == value == (half, (num_whole, 4, 8))
            assert output == (half, (own + case.packed.padding, 8, 8))
            assert log_sum_exp == (torch.float32, (8, own))
            groups = (half, (shared, 1, 8))
            queries = (half, (shared, 2, 8))
            assert heads == [queries, groups, groups, queries, (torch.float32, (2, shared))]


def _two_layers(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The second layer asks with the first one's answers, for other values."""
    return attention(attention(query, key, value), key, -value)


def _two_layers_on_rank(cases: list[SharedCase]) -> list[list[Tensor]]:
    """Through one exchange: what a layer has left in its buffers must not matter."""
    exchange = Exchange(None)
    results, open_cases = [], []
    for case in cases:
        query, key, value, grad = _own_tensors(case, torch.float64)
        layout = case.layout(dist.get_rank())
        rows = shared_rows(layout, device=CPU)
        attention = partial(
            packed_attention, rows=rows, exchange=exchange, softmax_scale=case.packed.softmax_scale
        )
        output = _two_layers(attention, query, key, value)
        open_cases.append((output, (query, key, value), grad))
    # As in a pipeline: all forward, then all backward.
    for output, leaves, grad in open_cases:
        results.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
    return results


def test_layers_and_micro_batches_share_buffers(ranks: Ranks) -> None:
    exchanging = SharedCase(FOUR.packed, FOUR.pieces, ulysses_rings=((0, 1, 2, 3),))
    other = head_tail_case("other", {(0, 1, 2, 3): (33,), (2, 0): (20,), (1, 3): (9, 40)})
    # Whole sequences beside heads that are exchanged.
    both = cut_case("both", ((1, 30),), ((0, 20), (1, 5), (2, 9), (3, 14), (0, 2)), heads=(8, 4, 8))
    both = SharedCase(both.packed, both.pieces, ulysses_rings=((0, 1, 2, 3),))
    cases = [FOUR, other, exchanging, both]
    found = ranks.run(4, _two_layers_on_rank, cases)
    for number, case in enumerate(cases):
        tensors = case.packed.tensors(dtype=torch.float64)
        exact = _two_layers(plain_attention(case.packed), *tensors[:3])
        expected = [exact.detach(), *torch.autograd.grad(exact, tensors[:3], tensors[3])]
        answer = together(case, [results[number] for results in found])
        for mine, theirs in zip(answer, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
