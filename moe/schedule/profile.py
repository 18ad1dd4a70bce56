"""Measures what the choice of chunks needs: alpha + n beta of each leg and of the experts.

All ranks of the expert-parallel group measure together, the legs of all nodes at the same time, as
they would run. A layer is as slow as its slowest rank, so of every point the largest time of all
ranks counts; and every rank ends up with the same numbers, or they would cut differently and hang.
Sizes go up to those of a whole layer, so measuring takes about ten layers' time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.route import Choices, Route, end_route
from moe.schedule.choose import PassCost, StageCost
from moe.schedule.expert_steps import Kept, backward_step, forward_step, weight_gradients
from moe.schedule.linear_cost import LinearCost, fit_linear
from moe.schedule.simulate import StreamName

_PARTS = (16, 4, 2, 1)
_LEAST_SECONDS = 1e-7


@dataclass(frozen=True, slots=True)
class LegProfile:
    """One leg: its link, and seconds by bytes that one rank sends to others."""

    stream: StreamName
    cost: LinearCost


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """What the parts of a layer cost, the same numbers on every rank.

    Attributes:
        legs: on the way out, in order.
        forward, backward: seconds of the experts, by rows that one rank computes; backward
            without the gradients of the weights, which are `weights`.
    """

    legs: tuple[LegProfile, ...]
    forward: LinearCost
    backward: LinearCost
    weights: LinearCost

    def passes(self, *, leg_bytes: Sequence[float], num_rows: float) -> tuple[PassCost, PassCost]:
        """Forward and backward of a whole layer, for `moe.schedule.choose`.

        Args:
            leg_bytes: that one rank sends to others on each leg out; as many come home.
            num_rows: of one rank's experts.
        """
        out = [
            StageCost(leg.stream, leg.cost, size)
            for leg, size in zip(self.legs, leg_bytes, strict=True)
        ]
        home = out[::-1]
        forward = StageCost("compute", self.forward, num_rows)
        backward = StageCost("compute", self.backward, num_rows)
        return (
            PassCost((*out, forward, *home)),
            PassCost((*out, backward, *home), tail_seconds=self.weights.seconds(num_rows)),
        )


def measure_leg(
    group: dist.ProcessGroup,
    *,
    num_bytes: int,
    everybody: dist.ProcessGroup,
    device: torch.device,
    num_repeats: int = 3,
) -> LinearCost:
    """Seconds of an all-to-all of `group` by the bytes that one rank sends to others.

    Args:
        num_bytes: of a whole layer.
        everybody: all ranks that measure now; each is in one group like `group`.
    """
    others = max(group.size() - 1, 1)
    sizes, seconds = [], []
    for part in _PARTS:
        to_each = max(num_bytes // part // others, 1)
        sent = torch.zeros(to_each * group.size(), dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)

        def once(sent: Tensor = sent, received: Tensor = received) -> None:
            dist.all_to_all_single(received, sent, group=group)

        sizes.append(to_each * others)
        seconds.append(_slowest_median_seconds(once, everybody, device, num_repeats))
    return fit_linear(sizes, seconds)


def measure_experts(
    linear_fc1: Tensor,
    linear_fc2: Tensor,
    *,
    num_rows: int,
    everybody: dist.ProcessGroup,
    num_repeats: int = 3,
) -> tuple[LinearCost, LinearCost, LinearCost]:
    """Seconds of forward, of the rows' and of the weights' gradients, by the rows that one rank
    computes, spread evenly.

    Args:
        linear_fc1, linear_fc2: this rank's experts; untouched.
        num_rows: of a whole layer.
    """
    fc1, fc2 = linear_fc1.detach(), linear_fc2.detach()
    num_experts, device = fc1.shape[0], fc1.device
    sizes: list[int] = []
    seconds: list[list[float]] = []
    for part in _PARTS:
        of_each = max(num_rows // part // num_experts, 1)
        sizes.append(of_each * num_experts)
        route = _local_route(num_experts, of_each, device)
        rows = torch.zeros(sizes[-1], fc1.shape[2], dtype=fc1.dtype, device=device)
        _, gate_up = forward_step(rows, route, fc1, fc2)
        kept = Kept(rows, gate_up)
        *_, parts = backward_step(rows, kept, route, fc1, fc2)
        steps = (
            partial(forward_step, rows, route, fc1, fc2),
            partial(backward_step, rows, kept, route, fc1, fc2),
            partial(weight_gradients, [parts], fc1, fc2),
        )
        seconds.append(
            [_slowest_median_seconds(step, everybody, device, num_repeats) for step in steps]
        )
    forward, backward, weights = (fit_linear(sizes, taken) for taken in zip(*seconds, strict=True))
    return forward, backward, weights


def _local_route(num_experts: int, of_each: int, device: torch.device) -> Route:
    """Rows that are here, each for one expert."""
    experts = torch.arange(num_experts, device=device).repeat_interleave(of_each)[:, None]
    return end_route(
        (),
        Choices(experts=experts, weights=torch.ones(experts.shape, device=device)),
        first_expert=0,
        counts=torch.full((num_experts,), of_each, dtype=torch.int64, device=device),
        num_rows=num_experts * of_each,
    )


def _slowest_median_seconds(
    once: Callable[[], object],
    everybody: dist.ProcessGroup,
    device: torch.device,
    num_repeats: int,
) -> float:
    """The median of this many runs after a warm-up; of all ranks the largest."""
    once()
    taken = []
    for _ in range(num_repeats):
        _synchronize(device)
        dist.barrier(group=everybody)
        began = time.perf_counter()
        once()
        _synchronize(device)
        taken.append(time.perf_counter() - began)
    median = torch.tensor(
        [max(statistics.median(taken), _LEAST_SECONDS)], dtype=torch.float64, device=device
    )
    dist.all_reduce(median, op=dist.ReduceOp.MAX, group=everybody)
    return float(median)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
