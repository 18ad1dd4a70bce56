"""Gradients of dense parts are reduced where the exchanges of experts leave the links free.

With `overlap_grad_reduce` megatron reduces a bucket as soon as its gradients are there. Those of
the part behind an expert layer are there just when that layer's gradients begin to travel, and both
then share the links between nodes:

    at once    inter   D1 D2 D3 + reduction .... C1 C2 C3
    in gaps    inter   D1 D2 D3 [ reduction ]    C1 C2 C3      held back until all chunks are out

(FSMoE, arXiv 2501.10714, section 5.) What does not fit into a gap starts when the layer has ended,
with the links free until the next one; the experts' own gradients are there at that time and are
not held back. A bucket is as large as a gap is long, if the user does not say. Which reduction
starts where follows from the order of the backward pass and from numbers that all ranks agreed on,
never from a clock; each bucket is summed as it would have been, so no bit of a gradient changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_ext.config import Config
from moe.schedule.linear_cost import LinearCost


@dataclass(frozen=True, slots=True)
class GapRoom:
    """How much a gap has room for; the same on all ranks.

    Attributes:
        seconds: of one gap.
        cost: of a reduction, by bytes of its bucket.
    """

    seconds: float
    cost: LinearCost

    def bucket_size(self, *, element_bytes: int) -> int | None:
        """Elements of the largest bucket that fits; None if there is no room."""
        rest = self.seconds - self.cost.fixed_seconds
        if rest <= 0 or self.cost.seconds_per_unit <= 0:
            return None
        return max(1, int(rest / self.cost.seconds_per_unit / element_bytes))


def reduction_cost(link: LinearCost, *, num_ranks: int, is_scattered: bool) -> LinearCost:
    """Of a ring, by bytes of a bucket: (d - 1) / d of them cross, and once more unless each rank
    keeps its part (ZeRO-1).

    Args:
        link: by bytes that one rank sends to others.
    """
    rounds = 1 if is_scattered else 2
    share = (num_ranks - 1) / num_ranks
    return LinearCost(rounds * link.fixed_seconds, rounds * share * link.seconds_per_unit)


@dataclass(frozen=True, slots=True)
class _Held:
    start: Callable[[], None]
    seconds: float


class HeldGradients:
    """Reductions that wait for a gap; see `moe.schedule.chunked.Gaps`."""

    def __init__(self, room: GapRoom) -> None:
        self.room = room
        self._held: deque[_Held] = deque()
        self._is_finishing = False

    def hold_back(self, chunks: Sequence[DistributedDataParallel]) -> None:
        """Take over the start of the chunks' reductions, but for those of experts."""
        for chunk in chunks:
            for group in chunk.bucket_groups:
                self._take_over(group)

    def between(self) -> None:
        left = self.room.seconds
        while self._held and self._held[0].seconds <= left:
            left -= self._held[0].seconds
            self._held.popleft().start()

    def after(self) -> None:
        while self._held:
            self._held.popleft().start()

    def _take_over(self, group: Any) -> None:
        start, finish = group.start_grad_sync, group.finish_grad_sync
        num_bytes = sum(bucket.grad_data.nbytes for bucket in group.buckets)
        seconds = self.room.cost.seconds(num_bytes)

        def hold(*args: Any, **kwargs: Any) -> None:
            if self._is_finishing:
                start(*args, **kwargs)
            else:
                self._held.append(_Held(partial(start, *args, **kwargs), seconds))

        def finish_all(*args: Any, **kwargs: Any) -> None:
            # Backward is over: the first group to be waited for starts what is left.
            self.after()
            self._is_finishing = True
            try:
                finish(*args, **kwargs)
            finally:
                self._is_finishing = False

        group.start_grad_sync, group.finish_grad_sync = hold, finish_all


def gradient_element_bytes(config: Config, parameter: torch.Tensor) -> int:
    """Of the buffers that are reduced."""
    return 4 if config.precision.grad_reduce_in_fp32 else parameter.element_size()
