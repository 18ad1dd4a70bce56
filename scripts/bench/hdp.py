"""Predicted step time of hybrid data parallelism at ByteScale's scale, and what each part brings.

    python scripts/bench/hdp.py [--ranks 1024] [--set bytescale_byted ...] [--seeds 3] [--json FILE]

The paper's case (arXiv 2502.21231, section 7): a 7B model with 8 groups of keys and values, 2M
tokens of context, 8K tokens per rank, a global batch of 32M tokens. Nothing is run: each planner
makes its plan, and all plans are timed by one cost model. The ablation goes as in the paper:

    static_cp       one context-parallel degree, sized for the longest sequence; packing
    dynamic         each sequence on ceil(s / C) ranks, dealt out in the order of the data
    + offload       fewer ranks for the longest (equation 3)
    + balance       `plan_hdp`: the same, with ranks chosen so that all end together

All constants are options and are printed: the ratios depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parallel.plan.cost import CostModel
from parallel.plan.cuts import even_cut
from parallel.plan.hdp import plan_hdp
from parallel.plan.offload_ratio import HostMemory, fewest_ranks
from parallel.plan.predict import Prediction, predict
from parallel.plan.records import MicroBatch, Piece, StepPlan
from parallel.plan.static_cp import plan_static_cp
from scripts.bench.length_sets import LENGTH_SETS, LengthSet
from scripts.bench.seven_billion import SEVEN_BILLION, seven_billion_cost

VARIANTS = ("static_cp", "dynamic", "+ offload", "+ balance", "+ balance, no offload")
# ByteScale, figure 19: 7B, 2M, Byted, 1,024 GPUs; and the headline for GitHub.
PAPER = {"dynamic": 1.59, "+ offload": 2.01, "+ balance": 3.69}


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What the prediction rests on."""

    teraflops: float
    link_gigabytes: float
    latency_microseconds: float
    host_gigabytes: float
    tokens_per_rank: int
    batch_tokens: int
    longest: int

    @property
    def cost_model(self) -> CostModel:
        return seven_billion_cost(
            flops_per_second=self.teraflops * 1e12,
            bytes_per_second=self.link_gigabytes * 1e9,
            latency_seconds=self.latency_microseconds * 1e-6,
            fixed_seconds=5e-3,
        )

    @property
    def host_memory(self) -> HostMemory:
        return HostMemory.from_model(SEVEN_BILLION, bytes_per_second=self.host_gigabytes * 1e9)


def plan_in_order(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    tokens_per_rank: int,
    cost_model: CostModel,
    host_memory: HostMemory | None,
) -> StepPlan:
    """The paper's algorithm 1: the ranks each sequence needs, dealt out without a look at time.

    Short sequences are packed as they come; packs and long sequences go to the next ranks in turn,
    so that all ranks get equally many micro-batches, of equally many tokens.
    """
    items: list[tuple[int, list[tuple[Piece, ...]], float]] = []
    pack: list[Piece] = []
    room = tokens_per_rank
    for sequence, length in enumerate(lengths):
        if length > tokens_per_rank:
            ranks = fewest_ranks(length, tokens_per_rank, cost_model, host_memory)
            pieces = even_cut(sequence, length, ranks)
            share = max(sum(piece.num_tokens for piece in part) for part in pieces)
            ratio = (
                host_memory.ratio(share, tokens_per_rank=tokens_per_rank) if host_memory else 0.0
            )
            items.append((ranks, pieces, ratio))
            continue
        if length > room:
            items.append((1, [tuple(pack)], 0.0))
            pack, room = [], tokens_per_rank
        pack.append(Piece(sequence, 0, length))
        room -= length
    if pack:
        items.append((1, [tuple(pack)], 0.0))
    micro_batches: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    turn = 0
    for ranks, pieces, ratio in items:
        # The ring is a block of ranks, so that blocks meet in the order of the data.
        for position, part in enumerate(pieces):
            micro_batches[(turn + position) % num_ranks].append(MicroBatch(part, ratio))
        turn = (turn + ranks) % num_ranks
    return StepPlan(
        lengths=tuple(lengths),
        tokens_per_rank=tokens_per_rank,
        micro_batches=tuple(map(tuple, micro_batches)),
        offloadable=host_memory.offloadable if host_memory else 0.0,
    )


def variants(
    lengths: Sequence[int], *, num_ranks: int, constants: Constants
) -> dict[str, tuple[Prediction, float]]:
    """For each variant its prediction and the seconds that planning took."""
    costs, host_memory = constants.cost_model, constants.host_memory
    shared: dict[str, Any] = {
        "num_ranks": num_ranks,
        "tokens_per_rank": constants.tokens_per_rank,
        "cost_model": costs,
    }
    # Static frameworks size the degree for the longest context, not for the batch at hand.
    degree = -(-constants.longest // constants.tokens_per_rank)
    while num_ranks % degree:
        degree += 1
    planners = {
        "static_cp": lambda: plan_static_cp(lengths, context_parallel_size=degree, **shared),
        "dynamic": lambda: plan_in_order(lengths, host_memory=None, **shared),
        "+ offload": lambda: plan_in_order(lengths, host_memory=host_memory, **shared),
        "+ balance": lambda: plan_hdp(lengths, host_memory=host_memory, **shared),
        "+ balance, no offload": lambda: plan_hdp(lengths, **shared),
    }
    found = {}
    for name in VARIANTS:
        began = time.perf_counter()
        plan = planners[name]()
        seconds = time.perf_counter() - began
        plan.check()
        found[name] = (predict(plan, costs, max_ranks_per_sequence=num_ranks), seconds)
    return found


def measure(
    length_set: LengthSet, *, num_ranks: int, num_seeds: int, constants: Constants
) -> dict[str, dict[str, float]]:
    """Medians over seeds of step seconds, speed-up over static_cp, and where the time goes."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in range(num_seeds):
        lengths = length_set.batch(constants.batch_tokens, longest=constants.longest, seed=seed)
        found = variants(lengths, num_ranks=num_ranks, constants=constants)
        static_seconds = found["static_cp"][0].step_seconds
        for name, (prediction, plan_seconds) in found.items():
            rows[name].append(
                {
                    "step_seconds": prediction.step_seconds,
                    "speed_up": static_seconds / prediction.step_seconds,
                    "efficiency": prediction.efficiency,
                    "idle_share": prediction.idle_share,
                    "communication_share": prediction.communication_share,
                    "gigabytes_sent_per_rank": statistics.mean(prediction.bytes_sent) / 1e9,
                    "peak_tokens": max(prediction.peak_tokens),
                    "plan_seconds": plan_seconds,
                }
            )
    return {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]}
        for name, found in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--set", dest="sets", action="append", help="of length_sets; repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teraflops", type=float, default=400.0)
    parser.add_argument("--link-gigabytes", type=float, default=50.0)
    parser.add_argument("--latency-microseconds", type=float, default=20.0)
    parser.add_argument("--host-gigabytes", type=float, default=25.0)
    parser.add_argument("--tokens-per-rank", type=int, default=8192)
    parser.add_argument("--batch-tokens", type=int, default=32 * 2**20)
    parser.add_argument("--longest", type=int, default=2 * 2**20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    constants = Constants(
        teraflops=options.teraflops,
        link_gigabytes=options.link_gigabytes,
        latency_microseconds=options.latency_microseconds,
        host_gigabytes=options.host_gigabytes,
        tokens_per_rank=options.tokens_per_rank,
        batch_tokens=options.batch_tokens,
        longest=options.longest,
    )
    print(f"{options.ranks:,} ranks, {asdict(constants)}")
    names = options.sets or ["bytescale_github", "bytescale_byted"]
    results = {}
    for length_set in LENGTH_SETS:
        if length_set.name not in names:
            continue
        found = measure(
            length_set, num_ranks=options.ranks, num_seeds=options.seeds, constants=constants
        )
        results[length_set.name] = found
        print(f"\n{length_set.name}: {length_set.quoted}")
        print(
            f"{'':22} {'step s':>8} {'speed-up':>9} {'paper':>6} {'of bound':>9} {'idle':>6} "
            f"{'comm.':>6} {'GB/rank':>8} {'plan s':>7}"
        )
        for name, row in found.items():
            paper = f"{PAPER[name]:.2f}" if name in PAPER and "byted" in length_set.name else ""
            print(
                f"{name:22} {row['step_seconds']:8.2f} {row['speed_up']:9.2f} {paper:>6} "
                f"{row['efficiency']:9.1%} {row['idle_share']:6.1%} "
                f"{row['communication_share']:6.1%} {row['gigabytes_sent_per_rank']:8.1f} "
                f"{row['plan_seconds']:7.2f}",
                flush=True,
            )
    if options.json:
        tree = {
            "date": str(date.today()),
            "ranks": options.ranks,
            "constants": asdict(constants),
            "results": results,
        }
        options.json.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
