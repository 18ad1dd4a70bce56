"""How long a plan's step takes, and how close that is to the best any plan could do.

A rank's micro-batches run one after the other, and the step ends with the slowest rank:

    step = max over ranks r of  (sum_m T_rm + (p - 1) max_m T_rm)

with T_rm the seconds of micro-batch m and p pipeline stages (the second term is 1F1B's bubble).
No plan can beat the mean over ranks, nor the longest sequence:

    bound = max(sum_i T_i / R,  max_i T_i / D) * (m + p - 1) / m

with T_i the seconds of sequence i, the fixed cost of the fewest micro-batches that hold all tokens
added, D the most ranks that may share a sequence, and m the plan's number of micro-batches on its
busiest rank. Communication is in neither.
"""

from dataclasses import dataclass

from parallel.plan.cost import CostModel
from parallel.plan.records import MicroBatch, StepPlan


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the cost model says of a plan."""

    step_seconds: float
    bound_seconds: float

    @property
    def efficiency(self) -> float:
        """bound / step: 1 for a plan that cannot be improved (and for an empty step)."""
        return self.bound_seconds / self.step_seconds if self.step_seconds > 0 else 1.0


def predict(
    plan: StepPlan,
    cost_model: CostModel,
    *,
    num_pipeline_stages: int = 1,
    max_ranks_per_sequence: int = 1,
) -> Prediction:
    """Predict the step; the cost model is that of one rank of one pipeline stage.

    max_ranks_per_sequence: over how many ranks a planner was allowed to spread one sequence.
    """
    bubble = num_pipeline_stages - 1
    ranks = [_seconds(batches, cost_model) for batches in plan.micro_batches]
    step_seconds = max(
        (sum(times) + bubble * max(times, default=0.0) for times in ranks), default=0.0
    )
    num_micro_batches = max((len(times) for times in ranks), default=0)
    return Prediction(
        step_seconds=step_seconds,
        bound_seconds=_bound_seconds(plan, cost_model, max_ranks_per_sequence)
        * ((num_micro_batches + bubble) / num_micro_batches if num_micro_batches else 1.0),
    )


def _seconds(batches: tuple[MicroBatch, ...], cost_model: CostModel) -> list[float]:
    return [cost_model.micro_batch_seconds(batch) for batch in batches]


def _bound_seconds(plan: StepPlan, cost_model: CostModel, max_ranks_per_sequence: int) -> float:
    if plan.num_tokens == 0 or plan.num_ranks == 0:
        return 0.0
    sequences = cost_model.lengths_seconds(plan.lengths)
    fewest_micro_batches = -(-plan.num_tokens // plan.tokens_per_rank)
    mean = (
        float(sequences.sum()) + cost_model.fixed_seconds * fewest_micro_batches
    ) / plan.num_ranks
    share = min(plan.num_ranks, max_ranks_per_sequence)
    return max(mean, float(sequences.max()) / share + cost_model.fixed_seconds)
