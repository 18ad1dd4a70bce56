"""How near plans come to what no plan can beat, and how long planning takes.

    python scripts/bench/hdp_quality.py [--ranks 8 32 64 256 1024] [--seeds 20] [--json FILE]

For each set of lengths (`length_sets`), number of ranks and seed: a batch of 32K tokens a rank,
sequences cut at what all ranks hold, planned by each planner and scored by the same lock-step
prediction against the same bound, communication in both. The model is like a 7B: 6.7e9 weights, 32
layers of 4,096, 8 key-value heads, 400 TFLOP/s attained, 50 GB/s and 10 us a message between ranks,
1 ms for each micro-batch, 8,192 tokens a rank. Times are of one core, in CPU seconds. The peers see
fewer batches, because they take long: megatron's scheduler up to 256 ranks, static context
parallelism up to 64.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel
from parallel.plan.hdp import plan_hdp
from parallel.plan.predict import predict
from parallel.plan.records import StepPlan
from parallel.plan.static_cp import plan_static_cp
from scripts.bench.length_sets import LENGTH_SETS, LengthSet

TOKENS_PER_RANK = 8192
BATCH_TOKENS_PER_RANK = 32768
LONGEST = 2 * 1024**2
_NUM_LAYERS, _HIDDEN_SIZE, _NUM_WEIGHTS = 32, 4096, 6.7e9

Planner = Callable[[Sequence[int], int, CostModel], StepPlan]


def seven_billion(
    *,
    flops_per_second: float = 400e12,
    bytes_per_second: float = 50e9,
    latency_seconds: float = 10e-6,
    fixed_seconds: float = 1e-3,
) -> CostModel:
    """T(s) = (6 P s + 3.5 (2 L H s^2)) / speed: flash attention's backward is 2.5 forwards."""
    attention = 2 * _NUM_LAYERS * _HIDDEN_SIZE * 3.5 / flops_per_second
    bytes_per_element, head_size, num_query_groups = 2, 128, 8
    return CostModel(
        quadratic_seconds=attention,
        linear_seconds=6 * _NUM_WEIGHTS / flops_per_second,
        fixed_seconds=fixed_seconds,
        communication=RingCost(
            bytes_per_second=bytes_per_second,
            key_value_bytes=2 * num_query_groups * head_size * bytes_per_element * _NUM_LAYERS,
            query_bytes=_HIDDEN_SIZE * bytes_per_element * _NUM_LAYERS,
            latency_seconds=latency_seconds * _NUM_LAYERS,
            num_query_groups=num_query_groups,
        ),
    )


def _hdp(lengths: Sequence[int], num_ranks: int, cost_model: CostModel) -> StepPlan:
    return plan_hdp(
        lengths, num_ranks=num_ranks, tokens_per_rank=TOKENS_PER_RANK, cost_model=cost_model
    )


def _static_cp(lengths: Sequence[int], num_ranks: int, cost_model: CostModel) -> StepPlan:
    return plan_static_cp(
        lengths, num_ranks=num_ranks, tokens_per_rank=TOKENS_PER_RANK, cost_model=cost_model
    )


def _megatron(lengths: Sequence[int], num_ranks: int, cost_model: CostModel) -> StepPlan:
    from megatron_ext.hybrid_cp_planner import plan_hybrid_cp

    return plan_hybrid_cp(lengths, num_ranks=num_ranks, tokens_per_rank=TOKENS_PER_RANK)


PLANNERS: dict[str, tuple[Planner, int]] = {
    "hdp": (_hdp, 1 << 30),
    "megatron": (_megatron, 256),
    "static_cp": (_static_cp, 64),
}
"""Each with the most ranks it is asked to plan for."""


def measure(
    planner: Planner, lengths: Sequence[int], num_ranks: int, cost_model: CostModel
) -> dict[str, float]:
    """One batch: plan, check, predict."""
    began = time.process_time()
    plan = planner(lengths, num_ranks, cost_model)
    plan_seconds = time.process_time() - began
    plan.check()
    found = predict(plan, cost_model, max_ranks_per_sequence=num_ranks)
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
    name: str, lengths_of: LengthSet, *, num_ranks: int, seeds: Sequence[int], cost_model: CostModel
) -> list[dict[str, float]]:
    """One planner, one set of lengths and one number of ranks."""
    planner, most_ranks = PLANNERS[name]
    if num_ranks > most_ranks:
        return []
    longest = min(LONGEST, num_ranks * TOKENS_PER_RANK)
    return [
        measure(
            planner,
            lengths_of.batch(BATCH_TOKENS_PER_RANK * num_ranks, longest=longest, seed=seed),
            num_ranks,
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
            measure(_hdp, batch, 256, cost_model)["plan_seconds"] for _ in range(3)
        )
        batch = lengths_of.batch(32 * 1024**2, longest=LONGEST, seed=0)
        found[f"12,288 ranks, 32M tokens, {lengths_of.name}"] = min(
            measure(_hdp, batch, 12288, cost_model)["plan_seconds"] for _ in range(3)
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64, 256, 1024])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--peer-seeds", type=int, default=3)
    parser.add_argument("--planners", nargs="+", default=list(PLANNERS), choices=list(PLANNERS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cost_model = seven_billion()
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "sets": {lengths_of.name: lengths_of.describe() for lengths_of in LENGTH_SETS},
        "rows": [],
        "planners": {},
    }
    for name in arguments.planners:
        # Once for nothing: the first call imports what the planner needs.
        PLANNERS[name][0]([100], 8, cost_model)
        seeds = range(arguments.seeds if name == "hdp" else arguments.peer_seeds)
        total: list[dict[str, float]] = []
        for num_ranks in arguments.ranks:
            for lengths_of in LENGTH_SETS:
                results = measure_set(
                    name, lengths_of, num_ranks=num_ranks, seeds=seeds, cost_model=cost_model
                )
                if not results:
                    continue
                total += results
                row = {"planner": name, "ranks": num_ranks, "set": lengths_of.name}
                row |= summary(results)
                report["rows"].append(row)
                print(_line(row), flush=True)
        if total:
            report["planners"][name] = summary(total)
            print(f"{name}: {_line(summary(total))}", flush=True)
    report["planning_seconds"] = planning_times(cost_model)
    for case, seconds in report["planning_seconds"].items():
        print(f"{case}: {seconds * 1e3:.0f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    head = f"{row['planner']:10s} {row['ranks']:5d} {row['set']:17s} " if "set" in row else ""
    return (
        f"{head}plan/bound median {row['median']:.4f} minimum {row['minimum']:.4f}   planning "
        f"{row['plan_seconds_median'] * 1e3:.0f} ms, at most "
        f"{row['plan_seconds_maximum'] * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main()
