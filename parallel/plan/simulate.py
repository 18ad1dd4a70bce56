"""A step played through: when each stage of each rank computes, waits, and ends.

Every (rank, stage) runs its list of `operations` one after the other. A computation lasts its
seconds; one that belongs to a meeting starts when all members have reached it and lasts as long as
the slowest. An exchange takes no time of its own: it is over when each of its transfers has been
posted at both ends. With e_x the end of x and x' the operation before it on the same stage:

    computation   e_x = max over members y of e_y' + max over members y of seconds_y
    exchange      e_x = max over partners y of max(e_x', e_y')

No operation competes for anything but its stage, so each end is computed once, as soon as what it
needs is known. When nothing more can be computed and a list is not at its end, the plan deadlocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.errors import PlanError
from parallel.plan.meetings import Meeting, Place, find_meetings
from parallel.plan.operations import Compute, Exchange, Operation, Transfer, stage_operations
from parallel.plan.records import StepPlan

SecondsOf = Callable[[int, int], float]
"""(rank, index of the micro-batch) -> forward and backward seconds on one stage."""

# Linear layers compute two gradients for one output.
_BACKWARD_OVER_FORWARD = 2.0
_MAX_LINES = 8


@dataclass(frozen=True, slots=True)
class StageTimeline:
    """What one stage of one rank ran, and when, in seconds from the start of the step."""

    rank: int
    stage: int
    operations: tuple[Operation, ...]
    start_seconds: npt.NDArray[np.float64]
    """[num_operations]. A meeting starts when its last member is there; an exchange when posted."""
    end_seconds: npt.NDArray[np.float64]
    """[num_operations]"""


@dataclass(frozen=True, slots=True)
class Simulation:
    """A whole step."""

    timelines: tuple[StageTimeline, ...]
    """Rank by rank, stage by stage."""
    step_seconds: float
    """Until the last stage of all ends."""
    busy_seconds: float
    """Computing, over all stages of all ranks; without the wait for a meeting's slowest member."""

    @property
    def idle_share(self) -> float:
        """Of all stages' time, the part in which they wait."""
        total = self.step_seconds * len(self.timelines)
        return 1.0 - self.busy_seconds / total if total > 0 else 0.0


def simulate(
    plan: StepPlan,
    *,
    seconds: SecondsOf | Sequence[Sequence[float]],
    num_pipeline_stages: int = 1,
    num_model_chunks: int = 1,
    expert_parallel_size: int = 1,
) -> Simulation:
    """Play a step of megatron's schedule for this many stages and model chunks.

    Args:
        seconds: forward and backward of one stage (all its chunks) for each micro-batch, as a
            function of rank and index or as [rank][index].
        expert_parallel_size: data-parallel ranks, consecutive, that exchange tokens in each layer.

    Raises:
        PlanError: the plan deadlocks; the message has ranks, stages and operations that wait for
            each other. Or interleaved stages have a number of micro-batches megatron refuses.
    """
    seconds_of = seconds if callable(seconds) else lambda rank, index: seconds[rank][index]
    chunk_seconds = 1.0 / (1.0 + _BACKWARD_OVER_FORWARD) / num_model_chunks
    step = _Step(
        plan,
        num_pipeline_stages,
        num_model_chunks,
        find_meetings(plan, expert_parallel_size=expert_parallel_size),
        forward_seconds=[
            [chunk_seconds * seconds_of(rank, index) for index in range(len(batches))]
            for rank, batches in enumerate(plan.micro_batches)
        ],
    )
    return step.run()


class _Step:
    """The state of all stages; a stage of a rank is numbered rank * P + stage."""

    def __init__(
        self,
        plan: StepPlan,
        num_stages: int,
        num_chunks: int,
        meetings: Sequence[Meeting],
        *,
        forward_seconds: list[list[float]],
    ) -> None:
        self.num_stages = num_stages
        self.forward_seconds = forward_seconds
        self.operations = _all_operations(plan, num_stages, num_chunks)
        num = len(self.operations)
        self.meetings = meetings
        self.meeting_of = {
            place: number for number, meeting in enumerate(meetings) for place in meeting.members
        }
        # A rank that is absent is waited for in vain.
        self.num_awaited = [len(m.members) + len(m.absent_ranks) for m in meetings]
        self.starts: list[list[float]] = [[] for _ in range(num)]
        self.ends: list[list[float]] = [[] for _ in range(num)]
        self.clock = [0.0] * num
        self.ready = list(range(num - 1, -1, -1))
        # (meeting, forward or backward, chunk, stage): who has reached it, and the seconds of each.
        self.arrived: dict[tuple[int, bool, int, int], dict[Place, float]] = {}
        # Transfers of a rank that one end has posted, and whose.
        self.posted: dict[tuple[int, Transfer], int] = {}
        # Of the exchange a stage is in: transfers without partner, and the end of the others.
        self.unmatched = [0] * num
        self.matched_seconds = [0.0] * num
        self.busy_seconds = 0.0

    def run(self) -> Simulation:
        while self.ready:
            self._advance(self.ready.pop())
        stuck = [number for number in range(len(self.operations)) if self._is_inside(number)]
        if stuck:
            raise PlanError(self._deadlock(stuck[0]))
        return Simulation(
            timelines=tuple(
                StageTimeline(
                    *divmod(number, self.num_stages),
                    operations=operations,
                    start_seconds=np.array(self.starts[number], dtype=np.float64),
                    end_seconds=np.array(self.ends[number], dtype=np.float64),
                )
                for number, operations in enumerate(self.operations)
            ),
            step_seconds=max(self.clock, default=0.0),
            busy_seconds=self.busy_seconds,
        )

    def _is_inside(self, number: int) -> bool:
        return len(self.ends[number]) < len(self.operations[number])

    def _advance(self, number: int) -> None:
        """Run a stage's operations until one has to wait."""
        operations, ends = self.operations[number], self.ends[number]
        while len(ends) < len(operations):
            operation = operations[len(ends)]
            if isinstance(operation, Compute):
                is_over = self._compute(number, operation)
            else:
                is_over = self._exchange(number, operation)
            if not is_over:
                return

    def _finish(self, number: int, start: float, end: float) -> None:
        self.starts[number].append(start)
        self.ends[number].append(end)
        self.clock[number] = end

    def _compute(self, number: int, step: Compute) -> bool:
        rank, stage = divmod(number, self.num_stages)
        duration = self.forward_seconds[rank][step.index]
        if not step.is_forward:
            duration *= _BACKWARD_OVER_FORWARD
        self.busy_seconds += duration
        meeting = self.meeting_of.get((rank, step.index))
        if meeting is None:
            start = self.clock[number]
            self._finish(number, start, start + duration)
            return True
        arrived = self.arrived.setdefault((meeting, step.is_forward, step.chunk, stage), {})
        arrived[rank, step.index] = duration
        if len(arrived) < self.num_awaited[meeting]:
            return False
        members = [member * self.num_stages + stage for member, _ in arrived]
        start = max(self.clock[member] for member in members)
        end = start + max(arrived.values())
        for member in members:
            self._finish(member, start, end)
            if member != number:
                self.ready.append(member)
        return True

    def _exchange(self, number: int, exchange: Exchange) -> bool:
        rank = number // self.num_stages
        start = self.clock[number]
        self.unmatched[number] = 0
        self.matched_seconds[number] = start
        for transfer in (*exchange.sends, *exchange.receives):
            other = self.posted.pop((rank, transfer), None)
            if other is None:
                self.posted[rank, transfer] = number
                self.unmatched[number] += 1
                continue
            end = max(start, self.clock[other])
            self.matched_seconds[number] = max(self.matched_seconds[number], end)
            self.matched_seconds[other] = max(self.matched_seconds[other], end)
            self.unmatched[other] -= 1
            if self.unmatched[other] == 0:
                self._finish(other, self.clock[other], self.matched_seconds[other])
                self.ready.append(other)
        if self.unmatched[number]:
            return False
        self._finish(number, start, self.matched_seconds[number])
        return True

    def _waits_for(self, number: int) -> Iterator[int]:
        """The stages without which a stuck one cannot go on."""
        rank, stage = divmod(number, self.num_stages)
        operation = self.operations[number][len(self.ends[number])]
        if isinstance(operation, Compute):
            number = self.meeting_of[rank, operation.index]
            arrived = self.arrived[number, operation.is_forward, operation.chunk, stage]
            meeting = self.meetings[number]
            missing = [place[0] for place in meeting.members if place not in arrived]
            for other in (*missing, *meeting.absent_ranks):
                yield other * self.num_stages + stage
        else:
            for transfer in (*operation.sends, *operation.receives):
                if self.posted.get((rank, transfer)) == number:
                    ahead = 1 if transfer.is_forward else -1
                    away = ahead if transfer in operation.sends else -ahead
                    yield rank * self.num_stages + (stage + away) % self.num_stages

    def _deadlock(self, number: int) -> str:
        """Follow who waits for whom until someone comes again, or has nothing left to run."""
        path: list[int] = []
        while number not in path and self._is_inside(number):
            path.append(number)
            number = next(self._waits_for(number))
        if number in path:
            path = path[path.index(number) :]
            head = "deadlock, each waits for the next and the last for the first"
            tail = []
        else:
            head = "deadlock, each waits for the next"
            tail = [f"{self._name(number)}: has ended its step"]
        lines = [f"{self._name(stuck)}: {self._describe(stuck)}" for stuck in path]
        if len(lines) > _MAX_LINES:
            lines[_MAX_LINES - 1 : -1] = [f"... {len(lines) - _MAX_LINES} more ..."]
        return "\n  ".join([f"{head}:", *lines, *tail])

    def _name(self, number: int) -> str:
        rank, stage = divmod(number, self.num_stages)
        return f"rank {rank}, stage {stage}" if self.num_stages > 1 else f"rank {rank}"

    def _describe(self, number: int) -> str:
        rank = number // self.num_stages
        operation = self.operations[number][len(self.ends[number])]
        if isinstance(operation, Compute):
            direction = "forward" if operation.is_forward else "backward"
            meeting = self.meetings[self.meeting_of[rank, operation.index]]
            return f"{direction} of micro-batch {operation.index}, part of {meeting}"
        parts = [
            f"{verb} {'activations' if transfer.is_forward else 'gradients'} of micro-batch "
            f"{transfer.index}"
            for verb, transfers in (
                ("sending", operation.sends),
                ("receiving", operation.receives),
            )
            for transfer in transfers
        ]
        return " and ".join(parts)


def _all_operations(
    plan: StepPlan, num_stages: int, num_chunks: int
) -> list[tuple[Operation, ...]]:
    """For rank 0's stages, then rank 1's, ...; ranks with equally many micro-batches share them."""
    by_count = {
        count: [
            stage_operations(
                count, stage=stage, num_pipeline_stages=num_stages, num_model_chunks=num_chunks
            )
            for stage in range(num_stages)
        ]
        for count in {len(batches) for batches in plan.micro_batches}
    }
    return [operations for batches in plan.micro_batches for operations in by_count[len(batches)]]
