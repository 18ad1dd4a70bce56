"""How near plans come to what no plan can beat, and how long planning takes.

    python scripts/bench/hdp_quality.py [--ranks 8 32 64 256 1024] [--seeds 20] [--json FILE]
    python scripts/bench/hdp_quality.py --stages 1 2 4 8 --experts 1 8 --planners hdp ...

For each set of lengths (`length_sets`), number of ranks and seed: a batch of 32K tokens a rank,
sequences cut at what all ranks hold, planned by each planner and scored by the same lock-step
prediction against the same bound, communication in both. Each rank (with a pipeline each stage of
it) holds a 7B model (`seven_billion`); 400 TFLOP/s attained, 50 GB/s and 10 us a message between
ranks, 1 ms for each micro-batch, 8,192 tokens a rank. Times are of one core, in CPU seconds. The
peers see fewer batches, because they take long: megatron's scheduler up to 256 ranks, static
context parallelism up to 64.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parallel.plan.cost import CostModel
from parallel.plan.hdp import plan_hdp
from parallel.plan.meetings import check_order
from parallel.plan.predict import predict
from parallel.plan.records import StepPlan
from parallel.plan.static_cp import plan_static_cp
from scripts.bench.length_sets import LENGTH_SETS, LengthSet
from scripts.bench.seven_billion import seven_billion_cost

TOKENS_PER_RANK = 8192
BATCH_TOKENS_PER_RANK = 32768
LONGEST = 2 * 1024**2


@dataclass(frozen=True, slots=True)
class Layout:
    """What a plan is for."""

    num_ranks: int
    num_stages: int = 1
    expert_size: int = 1


Planner = Callable[[Sequence[int], Layout, CostModel], StepPlan]


def _hdp(lengths: Sequence[int], layout: Layout, cost_model: CostModel) -> StepPlan:
    return plan_hdp(
        lengths,
        num_ranks=layout.num_ranks,
        tokens_per_rank=TOKENS_PER_RANK,
        cost_model=cost_model,
        num_pipeline_stages=layout.num_stages,
        expert_parallel_size=layout.expert_size,
    )


def _static_cp(lengths: Sequence[int], layout: Layout, cost_model: CostModel) -> StepPlan:
    return plan_static_cp(
        lengths,
        num_ranks=layout.num_ranks,
        tokens_per_rank=TOKENS_PER_RANK,
        cost_model=cost_model,
    )


def _megatron(lengths: Sequence[int], layout: Layout, cost_model: CostModel) -> StepPlan:
    from megatron_ext.hybrid_cp_planner import plan_hybrid_cp

    return plan_hybrid_cp(
        lengths,
        num_ranks=layout.num_ranks,
        tokens_per_rank=TOKENS_PER_RANK,
        num_pipeline_stages=layout.num_stages,
        expert_parallel_size=layout.expert_size,
    )


PLANNERS: dict[str, tuple[Planner, int]] = {
    "hdp": (_hdp, 1 << 30),
    "megatron": (_megatron, 256),
    "static_cp": (_static_cp, 64),
}
"""Each with the most ranks it is asked to plan for."""


def measure(
    planner: Planner, lengths: Sequence[int], layout: Layout, cost_model: CostModel
) -> dict[str, float]:
    """One batch: plan, check, predict."""
    began = time.process_time()
    plan = planner(lengths, layout, cost_model)
    plan_seconds = time.process_time() - began
    plan.check()
    check_order(
        plan,
        num_pipeline_stages=layout.num_stages,
        expert_parallel_size=layout.expert_size,
    )
    found = predict(
        plan,
        cost_model,
        num_pipeline_stages=layout.num_stages,
        expert_parallel_size=layout.expert_size,
        max_ranks_per_sequence=layout.num_ranks,
    )
    return {
        "efficiency": found.efficiency,
        "step_seconds": found.step_seconds,
        "bound_seconds": found.bound_seconds,
        "idle_share": found.idle_share,
        "communication_share": found.communication_share,
        "plan_seconds": plan_seconds,
        "num_sequences": len(lengths),
    }


def measure_set(
    name: str, lengths_of: LengthSet, layout: Layout, *, seeds: Sequence[int], cost_model: CostModel
) -> list[dict[str, float]]:
    """One planner, one set of lengths and one layout."""
    planner, most_ranks = PLANNERS[name]
    if layout.num_ranks > most_ranks:
        return []
    longest = min(LONGEST, layout.num_ranks * TOKENS_PER_RANK)
    return [
        measure(
            planner,
            lengths_of.batch(BATCH_TOKENS_PER_RANK * layout.num_ranks, longest=longest, seed=seed),
            layout,
            cost_model,
        )
        for seed in seeds
    ]


def summary(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median and minimum of the efficiency, median and maximum of the planning time."""
    efficiency = [result["efficiency"] for result in results]
    seconds = [result["plan_seconds"] for result in results]
    return {
        "batches": len(results),
        "median": statistics.median(efficiency),
        "minimum": min(efficiency),
        "plan_seconds_median": statistics.median(seconds),
        "plan_seconds_maximum": max(seconds),
    }


def planning_times(cost_model: CostModel) -> dict[str, float]:
    """The two cases that have a limit: 2,000 sequences on 256 ranks, 32M tokens on 12,288."""
    found = {}
    for lengths_of in LENGTH_SETS:
        batch = lengths_of.batch(40_000_000, longest=256 * TOKENS_PER_RANK, seed=0)[:2000]
        found[f"256 ranks, 2,000 sequences, {lengths_of.name}"] = min(
            measure(_hdp, batch, Layout(256), cost_model)["plan_seconds"] for _ in range(3)
        )
        batch = lengths_of.batch(32 * 1024**2, longest=LONGEST, seed=0)
        found[f"12,288 ranks, 32M tokens, {lengths_of.name}"] = min(
            measure(_hdp, batch, Layout(12288), cost_model)["plan_seconds"] for _ in range(3)
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64, 256, 1024])
    parser.add_argument("--stages", type=int, nargs="+", default=[1], help="pipeline")
    parser.add_argument("--experts", type=int, nargs="+", default=[1], help="size of a group")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--peer-seeds", type=int, default=3)
    parser.add_argument("--planners", nargs="+", default=list(PLANNERS), choices=list(PLANNERS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cost_model = seven_billion_cost()
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "sets": {lengths_of.name: lengths_of.describe() for lengths_of in LENGTH_SETS},
        "rows": [],
        "planners": [],
    }
    for name in arguments.planners:
        # Once for nothing: the first call imports what the planner needs.
        PLANNERS[name][0]([100], Layout(8), cost_model)
        seeds = range(arguments.seeds if name == "hdp" else arguments.peer_seeds)
        for num_stages, expert_size in itertools.product(arguments.stages, arguments.experts):
            total: list[dict[str, float]] = []
            for num_ranks in arguments.ranks:
                of_ranks: list[dict[str, float]] = []
                layout = Layout(num_ranks, num_stages, expert_size)
                for lengths_of in LENGTH_SETS:
                    results = measure_set(
                        name, lengths_of, layout, seeds=seeds, cost_model=cost_model
                    )
                    if not results:
                        continue
                    of_ranks += results
                    row = {"planner": name, "set": lengths_of.name, **asdict(layout)}
                    row |= summary(results)
                    report["rows"].append(row)
                    print(_line(row), flush=True)
                if of_ranks:
                    row = {"planner": name, "set": "all", **asdict(layout)} | summary(of_ranks)
                    report["rows"].append(row)
                    print(_line(row), flush=True)
                total += of_ranks
            if total:
                layout = Layout(0, num_stages, expert_size)
                row = {"planner": name, "set": "all", **asdict(layout)} | summary(total)
                report["planners"].append(row)
                print(_line(row), flush=True)
    report["planning_seconds"] = planning_times(cost_model)
    for case, seconds in report["planning_seconds"].items():
        print(f"{case}: {seconds * 1e3:.0f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    ranks = row["num_ranks"] or "any"
    return (
        f"{row['planner']:9s} R {ranks:>5} P {row['num_stages']} E {row['expert_size']} "
        f"{row['set']:16s} plan/bound median {row['median']:.4f} minimum {row['minimum']:.4f}   "
        f"planning {row['plan_seconds_median'] * 1e3:.0f} ms, at most "
        f"{row['plan_seconds_maximum'] * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main()
