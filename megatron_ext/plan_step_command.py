"""`megatron-ext plan-step`: the plan of one step for a file of sequence lengths, with no rank."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config import ParallelConfig, Planner
from megatron_ext.config_file import load_config
from megatron_ext.cost_profile import read_cost_profile
from megatron_ext.errors import UserError
from megatron_ext.model_shape import model_shape, stage_shape
from megatron_ext.planners import ask_planner
from parallel.errors import PlanError
from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel
from parallel.plan.meetings import check_order
from parallel.plan.predict import Prediction, micro_batch_seconds, predict
from parallel.plan.records import StepPlan
from parallel.plan.simulate import simulate

# Where a model leaves it to the tokenizer.
_VOCAB_SIZE = 128_256
_LATENCY_SECONDS = 20e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """What shall be planned; names as the options of the command."""

    lengths: Path
    num_ranks: int
    tokens_per_rank: int
    model: str
    planner: Planner
    num_pipeline_stages: int
    teraflops: float
    link_gigabytes: float
    cost_profile: Path | None


def plan_step(request: StepRequest, *, as_json: bool, plot: Path | None) -> int:
    """Print the plan and what is predicted of it; returns the exit code."""
    _check_numbers(request)
    lengths = read_lengths(request.lengths)
    cost_model = _cost_model(request)
    began = time.perf_counter()
    plan = make_plan(request, lengths, cost_model)
    plan_seconds = time.perf_counter() - began
    found = predict(
        plan,
        cost_model,
        num_pipeline_stages=request.num_pipeline_stages,
        # What the best planner may do is the measure for all.
        max_ranks_per_sequence=request.num_ranks,
    )
    if plot is not None:
        from megatron_ext.plan_plot import plot_plan

        simulation = simulate(
            plan,
            seconds=micro_batch_seconds(
                plan, cost_model, num_pipeline_stages=request.num_pipeline_stages
            ),
            num_pipeline_stages=request.num_pipeline_stages,
        )
        plot_plan(plan, simulation, plot)
    if as_json:
        print(json.dumps(_tree(plan, found, plan_seconds)))
    else:
        _print(request, plan, found, plan_seconds)
        if plot is not None:
            print(f"plot                 {plot}")
    return 0


def _check_numbers(request: StepRequest) -> None:
    for option, number in (
        ("--ranks", request.num_ranks),
        ("--tokens-per-rank", request.tokens_per_rank),
        ("--pipeline", request.num_pipeline_stages),
        ("--teraflops", request.teraflops),
        ("--link-gigabytes", request.link_gigabytes),
    ):
        if not number > 0:
            raise UserError(f"{option} {number}: must be above 0")


def read_lengths(path: Path) -> list[int]:
    """Sequence lengths in tokens, one a line.

    Raises:
        UserError: the file cannot be read, or a line is not a count; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--lengths {path}: cannot be read ({error})") from None
    lengths = []
    for number, line in enumerate(lines, start=1):
        if not line.strip().isdecimal():
            raise UserError(
                f"{path}: line {number} is {line[:40]!r}; expected the number of tokens of one "
                "sequence"
            )
        lengths.append(int(line))
    if not lengths:
        raise UserError(f"{path}: is empty; expected one sequence length a line")
    return lengths


def make_plan(request: StepRequest, lengths: Sequence[int], cost_model: CostModel) -> StepPlan:
    """Ask the planner that the request names.

    Raises:
        UserError: it cannot plan this.
    """
    try:
        plan = ask_planner(
            request.planner,
            lengths,
            num_ranks=request.num_ranks,
            tokens_per_rank=request.tokens_per_rank,
            cost_model=cost_model,
            num_pipeline_stages=request.num_pipeline_stages,
        )
        check_order(plan, num_pipeline_stages=request.num_pipeline_stages)
        return plan
    except PlanError as error:
        raise UserError(str(error)) from None


def _cost_model(request: StepRequest) -> CostModel:
    if request.cost_profile is not None:
        return read_cost_profile(request.cost_profile).cost_model
    config = load_config(request.model, ())
    stages = ParallelConfig(pipeline_model_parallel_size=request.num_pipeline_stages)
    shape = stage_shape(
        config.model_copy(update={"parallel": stages}),
        model_shape(config, config.model.vocab_size or _VOCAB_SIZE),
    )
    return CostModel.from_model(
        shape,
        flops_per_second=request.teraflops * 1e12,
        communication=RingCost.from_model(
            shape,
            bytes_per_second=request.link_gigabytes * 1e9,
            latency_seconds=_LATENCY_SECONDS,
        ),
    )


def _tree(plan: StepPlan, found: Prediction, plan_seconds: float) -> dict[str, Any]:
    return plan.to_dict() | {
        "predicted": {
            "step_seconds": found.step_seconds,
            "bound_seconds": found.bound_seconds,
            "efficiency": found.efficiency,
        },
        "plan_seconds": plan_seconds,
    }


def _print(request: StepRequest, plan: StepPlan, found: Prediction, plan_seconds: float) -> None:
    counts = [len(batches) for batches in plan.micro_batches]
    ranks_of: dict[int, set[int]] = {}
    for rank, batches in enumerate(plan.micro_batches):
        for batch in batches:
            for piece in batch.pieces:
                ranks_of.setdefault(piece.sequence, set()).add(rank)
    widths = [len(ranks) for ranks in ranks_of.values()]
    shared = [width for width in widths if width > 1]
    rows = {
        "planner": request.planner,
        "sequences": f"{len(plan.lengths):,} with {plan.num_tokens:,} tokens",
        "longest": f"{max(plan.lengths):,} tokens",
        "ranks": f"{plan.num_ranks:,} of {plan.tokens_per_rank:,} tokens",
        "micro-batches": f"{min(counts)} to {max(counts)} a rank",
        "shared sequences": f"{len(shared):,}, on up to {max(shared, default=0):,} ranks",
        "predicted step": f"{found.step_seconds:.4g} s",
        "bound": f"{found.bound_seconds:.4g} s",
        "efficiency": f"{found.efficiency:.1%} of the bound",
        "planned in": f"{plan_seconds * 1e3:.1f} ms",
    }
    for name, value in rows.items():
        print(f"{name:20} {value}")
