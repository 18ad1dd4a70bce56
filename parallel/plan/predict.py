"""How long a plan's step takes, where the time goes, and the best any plan could do.

Ranks run their micro-batches one after the other and wait only for those they share a sequence (or
experts) with (`lockstep`). A micro-batch takes its work, g, and the exchange of its rings. The step
ends with the slowest rank:

    step = max over ranks r of  (end of r's last micro-batch + (p - 1) max_m T_rm)

with p pipeline stages, the second term being 1F1B's bubble. In a pipeline each micro-batch is as
long as the plan's longest, so shorter ones pay the linear time of what is missing. What no plan can
beat is in `bound`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.plan.bound import bound_seconds
from parallel.plan.cost import CostModel
from parallel.plan.lockstep import FlatPlan, flatten, meetings, run_in_lockstep
from parallel.plan.records import StepPlan


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the cost model says of a plan. Shares are of all ranks' seconds in the step."""

    step_seconds: float
    bound_seconds: float
    idle_share: float = 0.0
    """Waiting for other ranks, at meetings and at the end, and the pipeline's bubble."""
    communication_share: float = 0.0
    """Exchange between ranks that share sequences, as far as it is not hidden."""
    padding_share: float = 0.0
    """Work on rows' padding."""
    bytes_sent: tuple[float, ...] = ()
    """Of each rank, forward and backward, in rings and all-to-alls."""
    peak_tokens: tuple[int, ...] = ()
    """Of each rank's fullest micro-batch, less what is offloaded."""

    @property
    def efficiency(self) -> float:
        """bound / step: 1 for a plan that cannot be improved (and for an empty step)."""
        return self.bound_seconds / self.step_seconds if self.step_seconds > 0 else 1.0


def predict(
    plan: StepPlan,
    cost_model: CostModel,
    *,
    num_pipeline_stages: int = 1,
    expert_parallel_size: int = 1,
    max_ranks_per_sequence: int | None = None,
) -> Prediction:
    """Predict the step; the cost model is that of one rank of one pipeline stage.

    max_ranks_per_sequence: over how many ranks a planner was allowed to spread one sequence. By
    default 1 if the plan shares no sequence, else all ranks.

    Raises:
        PlanError: the plan blocks, or a rank holds one sequence in two micro-batches.
    """
    flat = flatten(plan, cost_model)
    exchange, sent = _exchange(flat, plan, cost_model)
    padding = _padding(flat, cost_model, num_pipeline_stages)
    seconds = flat.seconds + exchange + padding
    timeline = run_in_lockstep(
        flat, seconds, meetings(flat, expert_parallel_size=expert_parallel_size)
    )
    bubble = num_pipeline_stages - 1
    step_seconds = _latest(flat, timeline.end, timeline.end - timeline.start, bubble)
    most = max_ranks_per_sequence or (plan.num_ranks if flat.rings else 1)
    bound = bound_seconds(
        plan.lengths,
        cost_model,
        num_ranks=max(plan.num_ranks, 1),
        tokens_per_rank=plan.most_tokens,
        max_ranks_per_sequence=most,
        num_pipeline_stages=num_pipeline_stages,
    )
    total = plan.num_ranks * step_seconds or 1.0
    return Prediction(
        step_seconds=step_seconds,
        bound_seconds=bound,
        idle_share=max(0.0, 1 - float(seconds.sum()) / total) if step_seconds else 0.0,
        communication_share=float(exchange.sum()) / total,
        padding_share=float(padding.sum()) / total,
        bytes_sent=tuple(_sum_by_rank(flat, sent).tolist()),
        peak_tokens=_peak_tokens(plan),
    )


def micro_batch_seconds(
    plan: StepPlan, cost_model: CostModel, *, num_pipeline_stages: int = 1
) -> tuple[tuple[float, ...], ...]:
    """Forward and backward seconds of each rank's micro-batches, waiting excluded.

    Work, g, exchange, and in a pipeline the padding.
    """
    flat = flatten(plan, cost_model)
    exchange, _ = _exchange(flat, plan, cost_model)
    seconds = flat.seconds + exchange + _padding(flat, cost_model, num_pipeline_stages)
    return tuple(
        tuple(seconds[begin:end].tolist())
        for begin, end in zip(flat.first[:-1], flat.first[1:], strict=True)
    )


def _padding(
    flat: FlatPlan, cost_model: CostModel, num_pipeline_stages: int
) -> npt.NDArray[np.float64]:
    """Seconds that each micro-batch spends on what it is shorter than the longest."""
    if num_pipeline_stages == 1 or not len(flat.tokens):
        return np.zeros(len(flat.tokens))
    missing = (flat.tokens.max() - flat.tokens).astype(np.float64)
    padding: npt.NDArray[np.float64] = missing * cost_model.linear_seconds
    return padding


def _exchange(
    flat: FlatPlan, plan: StepPlan, cost_model: CostModel
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Exposed seconds and bytes sent of each micro-batch."""
    seconds, sent = np.zeros(len(flat.tokens)), np.zeros(len(flat.tokens))
    ring_cost = cost_model.communication
    if ring_cost is None:
        return seconds, sent
    ulysses = frozenset(plan.ulysses)
    for ring in flat.rings:
        members = np.array(ring.micro_batches)
        num_ranks = len(members)
        lengths = np.array([plan.lengths[i] for i in ring.sequences], float)
        block = float(lengths.sum()) / num_ranks
        # What travels together travels alike: by heads only if that is right for all (`rings`).
        if ulysses.issuperset(ring.sequences):
            seconds[members] += ring_cost.ulysses_seconds(num_ranks, block_tokens=block)
            sent[members] += ring_cost.ulysses_bytes(block, num_ranks)
        else:
            hop = cost_model.quadratic_seconds * float(((lengths / num_ranks) ** 2).sum())
            # The largest block sets the pace.
            seconds[members] += ring_cost.ring_seconds(
                num_ranks, block_tokens=ring.block_tokens, hop_seconds=hop
            )
            sent[members] += ring_cost.ring_bytes(block, num_ranks)
    return seconds, sent


def _latest(
    flat: FlatPlan,
    end: npt.NDArray[np.float64],
    taken: npt.NDArray[np.float64],
    bubble: int,
) -> float:
    """The end of the step: of each rank's last micro-batch, and its longest `bubble` times more."""
    if not len(end):
        return 0.0
    filled = np.flatnonzero(np.diff(flat.first))
    last = end[flat.first[filled + 1] - 1]
    longest = np.maximum.reduceat(taken, flat.first[filled])
    return float((last + bubble * longest).max())


def _sum_by_rank(flat: FlatPlan, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return sums[flat.first[1:]] - sums[flat.first[:-1]]


def _peak_tokens(plan: StepPlan) -> tuple[int, ...]:
    return tuple(
        max(
            (
                round(batch.num_tokens * (1 - batch.offload_ratio * plan.offloadable))
                for batch in batches
            ),
            default=0,
        )
        for batches in plan.micro_batches
    )
