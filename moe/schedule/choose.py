"""How many chunks: as many as overlap pays for, and no more.

Stage i of a layer with r chunks takes  alpha_i + n_i beta_i / r  for each chunk. More chunks leave
less of the first and last one uncovered, and cost r alpha_i. Instead of solving each of the paper's
cases for a real r and rounding (SLSQP, its algorithm 1), all whole r up to a limit are simulated:
that is exact, also for orders of sending that the four cases do not cover, and takes milliseconds.

Forward and backward choose apart: backward the same bytes travel and the experts take about twice
as long, the half of it (gradients of the weights) as a tail that no chunk waits for.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.schedule.linear_cost import LinearCost
from moe.schedule.paper_cases import ChunkTimes, gradient_room_seconds
from moe.schedule.simulate import Stage, StreamName, bound_seconds, simulate

MAX_CHUNKS = 16
# A smaller lag than the paper's, or one more chunk, must promise this much: predictions are no
# better, and ranks that wait for each other suffer more from a tighter order.
_WORTHWHILE = 0.98
# What a backward pass cut unlike the forward pass must promise: rows are regrouped for it.
_WORTH_REGROUPING = 0.95


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage of a layer's way, uncut."""

    stream: StreamName
    cost: LinearCost
    size: float
    """Of the whole layer, in the units of `cost`."""

    def of_chunk(self, num_chunks: int) -> Stage:
        return Stage(self.stream, self.cost.seconds(self.size / num_chunks))


@dataclass(frozen=True, slots=True)
class PassCost:
    """Forward or backward pass of a layer.

    Attributes:
        stages: legs out, experts, legs home.
        tail_seconds: see `moe.schedule.simulate.simulate`.
    """

    stages: tuple[StageCost, ...]
    tail_seconds: float = 0.0

    def seconds(self, chunking: Chunking) -> float:
        """The pass's time, simulated."""
        num_chunks = chunking.num_chunks
        return simulate(
            self._cut(num_chunks), num_chunks, lag=chunking.lag, tail_seconds=self.tail_seconds
        ).seconds

    def bound_seconds(self, num_chunks: int) -> float:
        """What no order of so many chunks can beat."""
        return bound_seconds(self._cut(num_chunks), num_chunks, tail_seconds=self.tail_seconds)

    def gap_seconds(self, chunking: Chunking) -> float:
        """How long the links between nodes stay free between the two directions, in the paper's
        order (`moe.schedule.paper_cases`)."""
        *out, experts = self._cut(chunking.num_chunks)[: len(self.stages) // 2 + 1]
        inside = out[1].seconds if len(out) > 1 else 0.0
        times = ChunkTimes(a2a=out[0].seconds, ag=inside, rs=inside, exp=experts.seconds)
        return gradient_room_seconds(times, chunking.num_chunks)

    def _cut(self, num_chunks: int) -> list[Stage]:
        return [stage.of_chunk(num_chunks) for stage in self.stages]


@dataclass(frozen=True, slots=True)
class Chunking:
    """How a pass is cut, and in which order it is sent. The same on all ranks of a group.

    Attributes:
        num_chunks: 1 for no overlap.
        lag: see `moe.schedule.simulate`; num_chunks is the paper's order.
    """

    num_chunks: int
    lag: int

    @classmethod
    def of(cls, num_chunks: int) -> Chunking:
        """In the paper's order."""
        return cls(num_chunks=num_chunks, lag=num_chunks)


def choose_chunking(*passes: PassCost, max_chunks: int = MAX_CHUNKS) -> Chunking:
    """The fastest, and of nearly equal ones that with the fewest chunks and the paper's order.

    Args:
        passes: what is to be cut like this; the same on all ranks that travel together.
    """
    best = Chunking.of(1)
    least = sum(cost.seconds(best) for cost in passes)
    for num_chunks in range(2, max_chunks + 1):
        if sum(cost.bound_seconds(num_chunks) for cost in passes) >= _WORTHWHILE * least:
            continue
        for lag in range(num_chunks, -1, -1):
            found = Chunking(num_chunks=num_chunks, lag=lag)
            seconds = sum(cost.seconds(found) for cost in passes)
            if seconds < _WORTHWHILE * least:
                best, least = found, seconds
    return best


def choose_passes(
    forward: PassCost, backward: PassCost, *, max_chunks: int = MAX_CHUNKS
) -> tuple[Chunking, Chunking]:
    """Forward and backward: in as many chunks, unless apart they are clearly better.

    Backward keeps what forward computed; cut elsewhere, it has to regroup that.
    """
    common = choose_chunking(forward, backward, max_chunks=max_chunks)
    apart = (
        choose_chunking(forward, max_chunks=max_chunks),
        choose_chunking(backward, max_chunks=max_chunks),
    )
    together = forward.seconds(common) + backward.seconds(common)
    seconds = forward.seconds(apart[0]) + backward.seconds(apart[1])
    return apart if seconds < _WORTH_REGROUPING * together else (common, common)
