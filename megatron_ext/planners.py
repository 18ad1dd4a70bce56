"""Which planner makes the plan of a step, as the configuration says.

All planners answer with the same record and one executor runs it, so they can be compared on equal
terms: `packing` keeps sequences whole, `hdp` gives each the ranks it needs, `static_cp` spreads all
over one fixed number of ranks, `megatron` is megatron-core's own scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ext.config import Config, Planner
from megatron_ext.hybrid_cp_planner import plan_hybrid_cp
from parallel.plan.cost import CostModel
from parallel.plan.hdp import plan_hdp
from parallel.plan.meetings import check_order
from parallel.plan.offload_ratio import HostMemory
from parallel.plan.packing import plan_packing
from parallel.plan.records import StepPlan
from parallel.plan.static_cp import plan_static_cp

if TYPE_CHECKING:
    # It imports torch, which `plan-step` does without.
    from megatron_ext.run_costs import RunCosts


def plan_step(
    lengths: Sequence[int], config: Config, *, num_data_ranks: int, costs: RunCosts
) -> StepPlan:
    """The plan of one step, the same on every rank, with the proof that no rank waits for ever.

    Raises:
        PlanError: the planner cannot plan this, or its plan breaks the ordering rule.
    """
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    plan = ask_planner(
        parallel.planner,
        lengths,
        num_ranks=num_data_ranks,
        tokens_per_rank=config.data.micro_batch_tokens,
        cost_model=costs.cost_model,
        host_memory=costs.host_memory,
        num_pipeline_stages=stages,
        # megatron's interleaved schedule runs micro-batches in groups of the pipeline size.
        num_micro_batches_multiple=stages if chunks > 1 else 1,
        expert_parallel_size=parallel.num_expert_data_ranks,
    )
    check_order(
        plan,
        num_pipeline_stages=stages,
        num_model_chunks=chunks,
        expert_parallel_size=parallel.num_expert_data_ranks,
    )
    return plan


def ask_planner(
    planner: Planner,
    lengths: Sequence[int],
    *,
    num_ranks: int,
    tokens_per_rank: int,
    cost_model: CostModel,
    host_memory: HostMemory | None = None,
    num_pipeline_stages: int = 1,
    num_micro_batches_multiple: int = 1,
    expert_parallel_size: int = 1,
) -> StepPlan:
    """The plan of a planner by its name; each takes what it can of the limits.

    Raises:
        PlanError: the planner cannot plan this.
    """
    match planner:
        case "packing":
            return plan_packing(
                lengths,
                num_ranks=num_ranks,
                tokens_per_rank=tokens_per_rank,
                cost_model=cost_model,
                num_micro_batches_multiple=num_micro_batches_multiple,
                equal_num_micro_batches=expert_parallel_size > 1,
            )
        case "hdp":
            return plan_hdp(
                lengths,
                num_ranks=num_ranks,
                tokens_per_rank=tokens_per_rank,
                cost_model=cost_model,
                num_pipeline_stages=num_pipeline_stages,
                num_micro_batches_multiple=num_micro_batches_multiple,
                expert_parallel_size=expert_parallel_size,
                host_memory=host_memory,
            )
        case "static_cp":
            return plan_static_cp(
                lengths,
                num_ranks=num_ranks,
                tokens_per_rank=tokens_per_rank,
                cost_model=cost_model,
                num_micro_batches_multiple=num_micro_batches_multiple,
            )
        case "megatron":
            return plan_hybrid_cp(
                lengths,
                num_ranks=num_ranks,
                tokens_per_rank=tokens_per_rank,
                num_pipeline_stages=num_pipeline_stages,
                num_micro_batches_multiple=num_micro_batches_multiple,
                expert_parallel_size=expert_parallel_size,
            )
