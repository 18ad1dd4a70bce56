"""Hybrid data parallelism: every sequence gets the ranks that it needs, from one to all.

ByteScale's idea (arXiv 2502.21231): ranks are not arranged in a mesh of data and context ranks.
Long sequences are cut over as many ranks as they need, short ones are packed, and ranks run
different numbers of micro-batches; gradients are sums over tokens, so nothing else must agree.

Without a pipeline and experts, ranks wait only for those they share a sequence with: `search` lays
out blocks in time. With either, all ranks of a meeting count micro-batches alike: `rows`.
"""

from collections.abc import Sequence

from parallel.errors import PlanError
from parallel.plan.cost import CostModel
from parallel.plan.expert_rows import plan_expert_rows
from parallel.plan.input_check import check_not_empty, check_numbers
from parallel.plan.offload_ratio import HostMemory, fewest_ranks
from parallel.plan.records import StepPlan
from parallel.plan.rows import RowLimits, plan_rows
from parallel.plan.search import plan_free


def plan_hdp(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    tokens_per_rank: int,
    cost_model: CostModel,
    num_pipeline_stages: int = 1,
    num_micro_batches_multiple: int = 1,
    expert_parallel_size: int = 1,
    host_memory: HostMemory | None = None,
) -> StepPlan:
    """Plan a step of sequences of these lengths (tokens); the same plan in every process.

    num_micro_batches_multiple: every rank's number of micro-batches is a multiple of this, as
    interleaved pipelines need. expert_parallel_size: groups of so many consecutive ranks run the
    same number of micro-batches. host_memory: where activations of sequences longer than
    tokens_per_rank may go, so that fewer ranks hold them; None: nowhere.

    Raises:
        PlanError: a sequence is empty or longer than all ranks together can hold.
    """
    check_numbers(
        num_ranks=num_ranks,
        tokens_per_rank=tokens_per_rank,
        num_pipeline_stages=num_pipeline_stages,
        num_micro_batches_multiple=num_micro_batches_multiple,
        expert_parallel_size=expert_parallel_size,
    )
    if num_ranks % expert_parallel_size:
        raise PlanError(
            f"num_ranks {num_ranks} is no multiple of expert_parallel_size {expert_parallel_size}"
        )
    check_not_empty(lengths)
    capacity = num_ranks * tokens_per_rank
    for index, length in enumerate(lengths):
        if length <= capacity:
            continue
        needed = fewest_ranks(length, tokens_per_rank, cost_model, host_memory)
        if needed > num_ranks:
            raise PlanError(
                f"sequence {index} has {length} tokens and needs {needed} ranks of "
                f"tokens_per_rank = {tokens_per_rank}; there are {num_ranks}, which hold "
                f"{capacity}. Raise tokens_per_rank to {-(-length // num_ranks)}, or cut sequences "
                f"at {capacity} tokens"
            )
    if num_pipeline_stages == 1 and num_micro_batches_multiple == 1 and expert_parallel_size == 1:
        return plan_free(
            lengths,
            num_ranks=num_ranks,
            tokens_per_rank=tokens_per_rank,
            cost_model=cost_model,
            host_memory=host_memory,
        )
    if num_pipeline_stages == 1 and num_micro_batches_multiple == 1 and lengths:
        return plan_expert_rows(
            lengths,
            num_ranks=num_ranks,
            tokens_per_rank=tokens_per_rank,
            cost_model=cost_model,
            expert_parallel_size=expert_parallel_size,
            host_memory=host_memory,
        )
    limits = RowLimits(
        num_ranks=num_ranks,
        tokens_per_rank=tokens_per_rank,
        num_pipeline_stages=num_pipeline_stages,
        num_micro_batches_multiple=num_micro_batches_multiple,
        expert_parallel_size=expert_parallel_size,
    )
    return plan_rows(lengths, limits, cost_model, host_memory)
