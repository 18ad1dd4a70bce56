"""Whatever leaves comes back bit for bit: losses and gradients are those without offload."""

from __future__ import annotations

import random
from collections.abc import Hashable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import PlanError
from parallel.offload.link import InlineLink, Link
from parallel.offload.offload import NUM_RESIDENT_LAYERS, Offload
from parallel.offload.shuttle import Shuttle
from tests.parallel.offload.late_link import LateLink
from tests.parallel.offload.small_net import MicroBatch, Net, run_step

CPU = torch.device("cpu")
LAYERS = 5


def offload_of(net: Net, link: Link, *, page_bytes: int = 1 << 14) -> Offload:
    return Offload(
        Shuttle(CPU, link=link, page_bytes=page_bytes),
        num_layers=len(net.layers),
        weights=net.parameters(),
    )


def check_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(one, other), f"tensor {index} of {len(wanted)}"


@pytest.mark.parametrize("link", [InlineLink, LateLink])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_equals_no_offload(
    ratio: float, dtype: torch.dtype, recompute: bool, link: type[Link]
) -> None:
    net = Net(LAYERS, dtype=dtype)
    batches = [MicroBatch(120, ratio), MicroBatch(77, ratio)]
    offload = offload_of(net, link())
    for _ in range(2):
        found = run_step(net, batches, offload=offload, recompute=recompute)
        count = offload.end_step()
        check_equal(found, run_step(net, batches, offload=None))
        assert (count.offloaded_bytes > 0) == (ratio > 0)
        assert count.returned_bytes <= count.offloaded_bytes <= count.host_bytes


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[MicroBatch], list[tuple[str, int]]]:
    """Micro-batches of any size and ratio; each runs backward some time after forward."""
    sizes = st.integers(0, 130)
    ratios = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0))
    batches = draw(st.lists(st.builds(MicroBatch, sizes, ratios), min_size=1, max_size=4))
    order: list[tuple[str, int]] = []
    waiting: list[int] = []
    shuffle = random.Random(draw(st.integers(0, 10**6)))
    for index in range(len(batches)):
        order.append(("forward", index))
        waiting.append(index)
        while waiting and shuffle.random() < 0.4:
            order.append(("backward", waiting.pop(shuffle.randrange(len(waiting)))))
    shuffle.shuffle(waiting)
    return batches, [*order, *(("backward", index) for index in waiting)]


@settings(max_examples=60)
@given(
    schedule=schedules(),
    num_layers=st.integers(1, 6),
    page_bytes=st.sampled_from([1 << 12, 1 << 13, 1 << 20]),
    recompute=st.booleans(),
    is_last_chunk=st.booleans(),
)
def test_any_order_of_micro_batches(
    schedule: tuple[list[MicroBatch], list[tuple[str, int]]],
    num_layers: int,
    page_bytes: int,
    recompute: bool,
    is_last_chunk: bool,
) -> None:
    """All layers may leave where other chunks follow; then passes call each other back early."""
    batches, order = schedule
    net = Net(num_layers)
    link = LateLink()
    backward = [index for direction, index in order if direction == "backward"]
    following: dict[Hashable, Hashable] = dict(pairwise(backward))
    num_rank_layers = num_layers if is_last_chunk else num_layers + NUM_RESIDENT_LAYERS
    offload = Offload(
        Shuttle(CPU, link=link, page_bytes=page_bytes),
        num_layers=num_rank_layers,
        weights=net.parameters(),
        successor=following.get,
    )
    wanted = run_step(net, batches, offload=None, order=order)
    # Twice, so that host memory is used again.
    for _ in range(2):
        found = run_step(net, batches, offload=offload, order=order, recompute=recompute)
        count = offload.end_step()
        check_equal([*map(torch.nan_to_num, found)], [*map(torch.nan_to_num, wanted)])
        assert link.num_under_way == 0
        moves = num_rank_layers > NUM_RESIDENT_LAYERS and any(
            round(batch.ratio * batch.num_tokens) > 0 for batch in batches
        )
        assert (count.offloaded_bytes > 0) == moves


def test_host_memory_is_not_written_before_it_was_read() -> None:
    """Micro-batch 1 is called back while 0 ends; 3 and 4 leave to the memory of both."""
    net = Net(2)
    link = LateLink()
    offload = Offload(
        Shuttle(CPU, link=link),
        num_layers=4,
        weights=net.parameters(),
        successor={0: 1}.get,  # type: ignore[arg-type]
    )
    batches = [MicroBatch(64, 1.0)] * 5
    order = [("forward", 0), ("forward", 1), ("forward", 2), ("backward", 0)]
    order += [("forward", 3), ("forward", 4), *(("backward", index) for index in (1, 2, 3, 4))]
    found = run_step(net, batches, offload=offload, order=order)
    check_equal(found, run_step(net, batches, offload=None, order=order))


def test_a_pass_that_was_called_back_early_may_be_dropped() -> None:
    net = Net(2)
    link = LateLink()
    offload = Offload(
        Shuttle(CPU, link=link),
        num_layers=4,
        weights=net.parameters(),
        successor={0: 1}.get,  # type: ignore[arg-type]
    )
    x, table = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32)
    losses = []
    for index in range(3):
        with offload.forward_pass(0.5, num_tokens=[64], shared=[table], name=index) as watched:
            losses.append(net(x, table, watched).sum())
    losses[0].backward()
    assert link.num_under_way > 0
    del losses, watched
    offload.end_step()
    assert link.num_under_way == 0


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    offload = offload_of(Net(3), InlineLink())
    with (
        pytest.raises(PlanError, match="offload_ratio"),
        offload.forward_pass(ratio, num_tokens=[4]),
    ):
        pass


def test_backward_twice_over_a_kept_graph() -> None:
    net = Net(LAYERS)
    offload = offload_of(net, LateLink())
    x = torch.randn(90, 32, requires_grad=True)
    table = torch.randn(90, 32)
    with offload.forward_pass(0.7, num_tokens=[90], shared=[table]) as watched:
        output = net(x, table, watched).sum()
    (first,) = torch.autograd.grad(output, [x], retain_graph=True)
    (second,) = torch.autograd.grad(output, [x])
    assert torch.equal(first, second)


def failing_pass(net: Net, offload: Offload) -> None:
    with offload.forward_pass(0.5, num_tokens=[64]) as watched:
        net(torch.randn(64, 32, requires_grad=True), torch.randn(64, 32), watched)
        raise ValueError("in the middle")


def test_an_error_ends_the_pass() -> None:
    net = Net(LAYERS)
    offload = offload_of(net, LateLink())
    with pytest.raises(ValueError, match="in the middle"):
        failing_pass(net, offload)
    batches = [MicroBatch(64, 0.5)]
    check_equal(run_step(net, batches, offload=offload), run_step(net, batches, offload=None))
