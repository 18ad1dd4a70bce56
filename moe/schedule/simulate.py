"""When the parts of a chunked expert layer run: the definition that all choices rest on.

A chunk of tokens passes through stages in a row, each on one stream:

    one leg     inter                 -> compute ->                 inter
    two legs    inter -> intra        -> compute ->        intra -> inter

A stream does one thing at a time, in a fixed order; a stage starts when its stream is free and the
chunk's stage before it has ended. What a stream does next is decided beforehand, as a pure function
of the number of chunks, stages and `lag`: ranks may not look at their clocks, or they would send in
different orders.

    stage s of chunk c is issued in slot  c + s,  on the way back in slot  c + s + lag

With lag >= number of chunks that is the paper's order: all chunks go out, then all come back. A
smaller lag lets the first come home between the last going out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

StreamName = Literal["inter", "intra", "compute"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of every chunk's way: where it runs, and for how long."""

    stream: StreamName
    seconds: float
    """Of one chunk."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One stage of one chunk."""

    chunk: int
    stage: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a simulation found."""

    operations: tuple[Operation, ...]
    """In the order of issue."""
    ends_seconds: tuple[float, ...]
    """When each of them ends."""
    tail_ends_seconds: float

    @property
    def seconds(self) -> float:
        return max(*self.ends_seconds, self.tail_ends_seconds)


def issue_order(num_chunks: int, num_stages: int, *, lag: int) -> list[Operation]:
    """The order in which every rank starts things; of each stream, the order in which it runs.

    Args:
        num_stages: odd; the middle one is the computation.
        lag: slots between a chunk's last stage outward and the first on the way back, 0 or more.
    """
    middle = num_stages // 2

    def slot(operation: Operation) -> tuple[int, int, int]:
        is_back = operation.stage > middle
        number = operation.chunk + operation.stage + (lag if is_back else 0)
        # Within a slot: the chunk that is furthest first.
        return number, operation.chunk, operation.stage

    return sorted((Operation(c, s) for c in range(num_chunks) for s in range(num_stages)), key=slot)


def simulate(
    stages: Sequence[Stage],
    num_chunks: int,
    *,
    lag: int,
    tail_seconds: float = 0.0,
    gap: Stage | None = None,
) -> Timeline:
    """Run `num_chunks` chunks through `stages`.

    Args:
        tail_seconds: computation after that of the last chunk, which no chunk waits for.
        gap: one more thing that its stream does as soon as it has sent all chunks out, like the
            paper's gradient all-reduce between the two directions.
    """
    order = issue_order(num_chunks, len(stages), lag=lag)
    is_free = dict.fromkeys(("inter", "intra", "compute"), 0.0)
    has_ended = [0.0] * num_chunks
    ends = []
    for operation in order:
        stage = stages[operation.stage]
        if gap is not None and operation == Operation(0, len(stages) - 1):
            is_free[gap.stream] += gap.seconds
        start = max(is_free[stage.stream], has_ended[operation.chunk])
        has_ended[operation.chunk] = is_free[stage.stream] = start + stage.seconds
        ends.append(start + stage.seconds)
    return Timeline(
        operations=tuple(order),
        ends_seconds=tuple(ends),
        tail_ends_seconds=is_free["compute"] + tail_seconds,
    )


def bound_seconds(stages: Sequence[Stage], num_chunks: int, *, tail_seconds: float = 0.0) -> float:
    """What no order can beat: each stream's work, with one chunk's way to it and from it.

        max over streams of  r (its stages of a chunk) + stages before its first + after its last

    (docs/performance: the busiest stream plus one chunk's fill and drain.)
    """
    bounds = [0.0]
    for stream in {stage.stream for stage in stages}:
        own = [index for index, stage in enumerate(stages) if stage.stream == stream]
        outside = (*stages[: own[0]], *stages[own[-1] + 1 :])
        busy = num_chunks * sum(stages[index].seconds for index in own)
        bounds.append(busy + sum(stage.seconds for stage in outside))
        if stream == "compute":
            # The tail stands in for the last chunk's way home where it is longer.
            before = sum(stage.seconds for stage in stages[: own[0]])
            bounds.append(before + busy + tail_seconds)
    return max(bounds)
