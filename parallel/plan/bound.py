"""What no plan of a step can beat.

With T_i(D) the seconds of sequence i on D ranks, exchange and all, a step of T seconds needs

    sum_i min { D T_i(D) : T_i(D) <= T } + fewest micro-batches g  <=  R T

since each sequence is through within the step and takes the rank-seconds of some number of ranks.
The bound is the least such T. It is never less than the mean with the cheapest exchange, nor than
the longest sequence on its best D; it is more where only a costly exchange gets a sequence through
in time.

Groups of experts wait for each other besides, so it holds for them as well. A pipeline has a bound
of its own (`pipeline_bound`). Both count the exchange of every shared sequence by itself. In a plan
in which several have the same ranks in one micro-batch (`static_cp` makes such; `plan_hdp` none) a
long one's computation could hide part of a short one's exchange.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from parallel.plan.cost import CostModel
from parallel.plan.pipeline_bound import pipeline_bound

# Only so many of the longest sequences are asked what they lose by being quick.
_NUM_DECISIVE = 64


def bound_seconds(
    lengths: Sequence[int],
    cost_model: CostModel,
    *,
    num_ranks: int,
    tokens_per_rank: int,
    max_ranks_per_sequence: int | None = None,
    num_pipeline_stages: int = 1,
) -> float:
    """The least time of a step.

    tokens_per_rank: the most that a micro-batch may hold, with what it may offload.
    max_ranks_per_sequence: over how many ranks a planner may spread one sequence; None: all.
    """
    if not lengths or not sum(lengths):
        return 0.0
    most = min(num_ranks, max_ranks_per_sequence or num_ranks)
    if num_pipeline_stages > 1:
        return pipeline_bound(
            lengths,
            cost_model,
            num_ranks=num_ranks,
            tokens_per_rank=tokens_per_rank,
            max_ranks_per_sequence=most,
            num_pipeline_stages=num_pipeline_stages,
        ).seconds
    length = np.asarray(lengths, dtype=np.int64)
    fewest = np.maximum(np.minimum(-(-length // tokens_per_rank), most), 1)
    cheapest = _cheapest(length, fewest, most, cost_model)
    fixed = cost_model.fixed_seconds * -(-int(length.sum()) // tokens_per_rank)
    total = float(cheapest.sum()) + fixed
    longest = int(length.argmax())
    options = _seconds_by_ranks(int(length[longest]), int(fewest[longest]), most, cost_model)
    least = max(total / num_ranks, float(options.min()) + cost_model.fixed_seconds)
    alone = cost_model.shared_seconds(length, fewest)
    hurried = np.flatnonzero(alone > least - cost_model.fixed_seconds)
    if not len(hurried):
        return least
    hurried = hurried[np.argsort(-length[hurried], kind="stable")[:_NUM_DECISIVE]]
    options_of = [
        (int(fewest[i]), _seconds_by_ranks(int(length[i]), int(fewest[i]), most, cost_model))
        for i in hurried
    ]
    rest = total - float(cheapest[hurried].sum())
    return _least_step(least, rest, options_of, num_ranks, cost_model.fixed_seconds)


def _cheapest(
    length: npt.NDArray[np.int64],
    fewest: npt.NDArray[np.int64],
    most: int,
    cost_model: CostModel,
) -> npt.NDArray[np.float64]:
    """min_D D T_i(D) of each sequence.

    Both exchanges cost more rank-seconds the more ranks there are, so the fewest ranks that may do
    it are the best for each; an all-to-all needs a divisor of the heads.
    """
    least = cost_model.shared_seconds(length, fewest) * fewest
    groups = cost_model.communication.num_query_groups if cost_model.communication else 0
    for divisor in range(2, min(groups, most) + 1):
        if groups % divisor == 0:
            seconds = cost_model.shared_seconds(length, divisor) * divisor
            least = np.where((fewest <= divisor) & (seconds < least), seconds, least)
    return least


def _seconds_by_ranks(
    length: int, fewest: int, most: int, cost_model: CostModel
) -> npt.NDArray[np.float64]:
    """T_i(D) for D = fewest, fewest + 1, ... as far as there are ranks and tokens."""
    return cost_model.shared_seconds(length, np.arange(fewest, max(fewest, min(most, length)) + 1))


def _least_step(
    least: float,
    rest: float,
    options_of: Sequence[tuple[int, npt.NDArray[np.float64]]],
    num_ranks: int,
    fixed_seconds: float,
) -> float:
    """By halving: the least T of which the ranks have R T seconds enough for all."""

    def needed(step: float) -> float:
        seconds = rest
        for fewest, options in options_of:
            quick = np.flatnonzero(options <= step - fixed_seconds)
            if not len(quick):
                quick = np.array([options.argmin()])
            seconds += float(((fewest + quick) * options[quick]).min())
        return seconds

    low, high = least, 2 * least
    while needed(high) > high * num_ranks:
        low, high = high, 2 * high
    if needed(low) <= low * num_ranks:
        return low
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        if needed(middle) > middle * num_ranks:
            low = middle
        else:
            high = middle
    return low
