"""Gradients that wait for a gap are those that did not wait, bit for bit, on every rank alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.gradient_gaps import GapRoom, reduction_cost
from moe.schedule.linear_cost import LinearCost
from tests.megatron_ext.layout_settings import EP2, PLAIN, ZERO1
from tests.megatron_ext.test_moe_equals_single import BATCH, MOE
from tests.megatron_ext.tiny_run import tiny_tree, train_and_report
from tests.rank_pool import Ranks

NUM_STEPS = 3
CHUNKS = {"moe_num_chunks": 2}


def train_and_watch(tree: dict[str, Any], room: GapRoom | None) -> dict[str, Any]:
    """A report, and what started when: gaps, ends of layers, reductions by the shape of buckets.

    Args:
        room: in place of the measured one; None: nothing is held back.
    """
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    from megatron_ext import expert_schedule
    from megatron_ext.gradient_gaps import HeldGradients

    log: list[Any] = []
    real_start = _ParamAndGradBucketGroup.start_grad_sync

    class Watched(HeldGradients):
        def between(self) -> None:
            log.append("gap")
            super().between()

        def after(self) -> None:
            log.append("end")
            super().after()

    def start(group: Any, *args: Any, **kwargs: Any) -> None:
        log.append([bucket.grad_data.numel() for bucket in group.buckets])
        real_start(group, *args, **kwargs)

    changes: list[tuple[Any, str, Any]] = [(_ParamAndGradBucketGroup, "start_grad_sync", start)]
    if room is not None:
        changes += [
            (expert_schedule, "_room", lambda *args: room),
            (expert_schedule, "HeldGradients", Watched),
        ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        report = train_and_report(tree, NUM_STEPS)
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
    return report | {"log": log}


@pytest.mark.parametrize("optimizer", [PLAIN, ZERO1], ids=["all-reduce", "ZeRO-1"])
def test_waiting_changes_no_bit(ranks: Ranks, corpus: Path, optimizer: dict[str, Any]) -> None:
    """Two groups of two ranks that share experts; a gap has room for one bucket of two or so."""
    room = GapRoom(1.0, LinearCost(0.0, 1.0 / 40_000))
    reports = []
    for is_held in (False, True):
        parallel = EP2 | optimizer | {"overlap_grad_reduce": True, "ddp_bucket_size": 4000}
        parallel["grad_reduce_in_gaps"] = is_held
        folder = corpus.parent / "gaps"
        tree = tiny_tree(corpus, folder, parallel=parallel, moe=MOE | CHUNKS, **BATCH)
        args = (tree, room if is_held else None)
        reports.append(ranks.run(4, train_and_watch, *args, megatron=True))
    for at_once, held in zip(*reports, strict=True):
        assert held["losses"] == at_once["losses"]
        for wanted, found in zip(at_once["grads"], held["grads"], strict=True):
            assert all(torch.equal(found[name], grad) for name, grad in wanted.items())
        # The same reductions, in another order.
        counts = [[x for x in r["log"] if isinstance(x, list)] for r in (at_once, held)]
        assert sorted(counts[0]) == sorted(counts[1])
    logs = [report["log"] for report in reports[1]]
    assert all(log == logs[0] for log in logs)
    in_gaps = [b for a, b in zip(logs[0], logs[0][1:], strict=False) if a == "gap"]
    assert any(isinstance(started, list) for started in in_gaps)


def test_buckets_are_as_large_as_a_gap(ranks: Ranks, corpus: Path) -> None:
    """Two ranks add up two numbers, in whatever buckets. After a step weights differ by rounding,
    for the norm of the gradients is a sum over other shards."""
    reports = []
    for is_held in (False, True):
        parallel = EP2 | ZERO1 | {"overlap_grad_reduce": True, "grad_reduce_in_gaps": is_held}
        folder = corpus.parent / "room"
        tree = tiny_tree(corpus, folder, parallel=parallel, moe=MOE | CHUNKS, **BATCH)
        room = GapRoom(1.0, LinearCost(0.0, 1.0 / 20_000)) if is_held else None
        reports.append(ranks.run(2, train_and_watch, tree, room, megatron=True))
    for at_once, held in zip(*reports, strict=True):
        largest = [max(max(x) for x in r["log"] if isinstance(x, list)) for r in (at_once, held)]
        assert largest[1] < largest[0]
        wanted, found = at_once["grads"][0], held["grads"][0]
        assert all(torch.equal(found[name], grad) for name, grad in wanted.items())
        assert held["losses"] == pytest.approx(at_once["losses"], rel=1e-5)


def test_measured(ranks: Ranks, corpus: Path) -> None:
    """As a user runs it: the room is what this machine's links and experts leave."""
    parallel = EP2 | ZERO1 | {"overlap_grad_reduce": True, "grad_reduce_in_gaps": True}
    moe = MOE | {"moe_num_chunks": "auto", "moe_num_backward_chunks": 2}
    tree = tiny_tree(corpus, corpus.parent / "auto", parallel=parallel, moe=moe, **BATCH)
    first, *others = ranks.run(4, train_and_report, tree, 2, megatron=True)
    assert all(other["losses"] == first["losses"] for other in others)


@given(
    seconds=st.floats(0.0, 1.0),
    fixed=st.floats(0.0, 0.1),
    per_byte=st.floats(1e-9, 1e-3),
    num_ranks=st.integers(2, 64),
    is_scattered=st.booleans(),
)
def test_the_largest_bucket_fits(
    seconds: float, fixed: float, per_byte: float, num_ranks: int, is_scattered: bool
) -> None:
    link = LinearCost(fixed, per_byte)
    cost = reduction_cost(link, num_ranks=num_ranks, is_scattered=is_scattered)
    size = GapRoom(seconds, cost).bucket_size(element_bytes=4)
    if size is None:
        assert cost.fixed_seconds >= seconds
    elif size > 1:
        assert cost.seconds(4 * size) <= seconds * (1 + 1e-9)
        assert cost.seconds(4 * (size + 1)) > seconds * (1 - 1e-9)
