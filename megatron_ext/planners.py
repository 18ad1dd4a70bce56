"""Which planner makes the plan of a step, as the configuration says.

All planners answer with the same record and one executor runs it, so they can be compared on equal
terms: `packing` keeps sequences whole, `hdp` gives each the ranks it needs, `static_cp` spreads all
over one fixed number of ranks, `megatron` is megatron-core's own scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.config import Config
from megatron_ext.hybrid_cp_planner import plan_hybrid_cp
from megatron_ext.run_costs import RunCosts
from parallel.plan.hdp import plan_hdp
from parallel.plan.meetings import check_order
from parallel.plan.packing import plan_packing
from parallel.plan.records import StepPlan
from parallel.plan.static_cp import plan_static_cp


def plan_step(
    lengths: Sequence[int], config: Config, *, num_data_ranks: int, costs: RunCosts
) -> StepPlan:
    """The plan of one step, the same on every rank, with the proof that no rank waits for ever.

    Raises:
        PlanError: the planner cannot plan this, or its plan breaks the ordering rule.
    """
    plan = _ask_planner(lengths, config, num_data_ranks=num_data_ranks, costs=costs)
    check_order(
        plan,
        num_pipeline_stages=config.parallel.pipeline_model_parallel_size,
        num_model_chunks=config.parallel.virtual_pipeline_model_parallel_size or 1,
        expert_parallel_size=config.parallel.num_expert_data_ranks,
    )
    return plan


def _ask_planner(
    lengths: Sequence[int], config: Config, *, num_data_ranks: int, costs: RunCosts
) -> StepPlan:
    parallel = config.parallel
    capacity = config.data.micro_batch_tokens
    is_interleaved = (parallel.virtual_pipeline_model_parallel_size or 1) > 1
    # megatron's interleaved schedule runs micro-batches in groups of the pipeline size.
    multiple = parallel.pipeline_model_parallel_size if is_interleaved else 1
    match parallel.planner:
        case "packing":
            return plan_packing(
                lengths,
                num_ranks=num_data_ranks,
                tokens_per_rank=capacity,
                cost_model=costs.cost_model,
                num_micro_batches_multiple=multiple,
                equal_num_micro_batches=parallel.num_expert_data_ranks > 1,
            )
        case "hdp":
            return plan_hdp(
                lengths,
                num_ranks=num_data_ranks,
                tokens_per_rank=capacity,
                cost_model=costs.cost_model,
                num_pipeline_stages=parallel.pipeline_model_parallel_size,
                num_micro_batches_multiple=multiple,
                expert_parallel_size=parallel.num_expert_data_ranks,
                host_memory=costs.host_memory,
            )
        case "static_cp":
            return plan_static_cp(
                lengths,
                num_ranks=num_data_ranks,
                tokens_per_rank=capacity,
                cost_model=costs.cost_model,
                num_micro_batches_multiple=multiple,
            )
        case "megatron":
            return plan_hybrid_cp(lengths, num_ranks=num_data_ranks, tokens_per_rank=capacity)
