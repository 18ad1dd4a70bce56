"""Any plan on any layout gives one rank's loss and gradients, in float32.

Tolerance: as in test_parallel_equals_single: sums in another order, 1e-5 relative.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.hybrid_cp_planner import plan_hybrid_cp
from parallel.plan.cost import CostModel
from parallel.plan.hdp import plan_hdp
from parallel.plan.meetings import check_order
from parallel.plan.records import MicroBatch, Piece, StepPlan
from parallel.plan.static_cp import plan_static_cp
from tests.megatron_ext.layout_settings import PLAIN, PP2, SP, TP2, VPP2
from tests.megatron_ext.planned_step import run_plans, single_plan
from tests.megatron_ext.tiny_run import tiny_tree
from tests.rank_pool import Ranks

TOLERANCE = 1e-5
CAPACITY = 64
COSTS = CostModel(quadratic_seconds=1e-6, linear_seconds=1e-4, fixed_seconds=1e-3)

# (ranks, data-parallel ranks among them, settings)
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "DP2": (2, 2, PLAIN),
    "DP4+ZeRO-1": (4, 4, {}),
    "DP8": (8, 8, PLAIN),
    "DP4, full recomputation": (4, 4, PLAIN | {"recompute_granularity": "full"}),
    "DP4+ZeRO-1 overlapped": (4, 4, {"overlap_grad_reduce": True, "ddp_bucket_size": 4000}),
    "TP2+SPxDP2": (4, 2, PLAIN | TP2 | SP),
    "PP2xDP2": (4, 2, PLAIN | PP2),
    "PP2 interleavedxDP2": (4, 2, PLAIN | PP2 | VPP2),
    "PP2xDP4": (8, 4, PLAIN | PP2),
    "DP2, offload": (2, 2, PLAIN | {"planner": "hdp", "offload_activations": True}),
}

BATCHES: dict[str, list[int]] = {
    "mixed": [100, 3, 17, 64, 90, 1, 5, 40, 33, 120],
    "one giant": [128, 1],
    "all equal": [32] * 8,
    "one token": [1],
    "none": [],
}
# The planners of the configuration refuse sequences of no tokens; megatron's skips them.
MEGATRON_BATCHES = BATCHES | {"some empty": [0, 5, 0, 120, 1, 64]}


@pytest.fixture(scope="module")
def tree(corpus: Path) -> dict[str, Any]:
    return tiny_tree(
        corpus,
        corpus.parent / "run",
        data={"tokens_per_rank": CAPACITY, "max_sequence_length": CAPACITY},
    )


def expected_of(ranks: Ranks, tree: dict[str, Any], batches: Sequence[Sequence[int]]) -> Any:
    tree = tree | {"parallel": PLAIN}
    (found,) = ranks.run(1, run_plans, tree, [single_plan(b) for b in batches], megatron=True)
    return found


def check_plans(
    ranks: Ranks, tree: dict[str, Any], layout: str, plans: Sequence[StepPlan], expected: Any
) -> None:
    world_size, _, parallel = LAYOUTS[layout]
    for plan in plans:
        plan.check()
    reports = ranks.run(world_size, run_plans, tree | {"parallel": parallel}, plans, megatron=True)
    for index, (loss, grads) in enumerate(expected):
        what = f"plan {index} with lengths {list(plans[index].lengths)}"
        whole: dict[str, Any] = {}
        for report in reports:
            found, part = report[index]
            assert found == pytest.approx(loss, rel=TOLERANCE), what
            whole |= part
        assert whole.keys() == grads.keys(), what
        difference = math.sqrt(sum(float((whole[n] - grads[n]).square().sum()) for n in grads))
        size = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        assert difference <= TOLERANCE * size, f"{what}: {difference / max(size, 1e-30):.2e}"
        assert size > 0 or not plans[index].num_tokens, what


# Offload is for random plans; eight ranks are for what is made of powers of two.
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"DP2, offload", "DP8"}))
def test_planners_equal_one_rank(ranks: Ranks, tree: dict[str, Any], layout: str) -> None:
    _, num_ranks, parallel = LAYOUTS[layout]
    stages = parallel.get("pipeline_model_parallel_size", 1)
    multiple = stages if "virtual_pipeline_model_parallel_size" in parallel else 1
    plans = []
    for lengths in BATCHES.values():
        plans.append(
            plan_hdp(
                lengths,
                num_ranks=num_ranks,
                tokens_per_rank=CAPACITY,
                cost_model=COSTS,
                num_pipeline_stages=stages,
                num_micro_batches_multiple=multiple,
            )
        )
        if multiple == 1:
            plans.append(
                plan_static_cp(
                    lengths, num_ranks=num_ranks, tokens_per_rank=CAPACITY, cost_model=COSTS
                )
            )
    expected = expected_of(ranks, tree, [plan.lengths for plan in plans])
    check_plans(ranks, tree, layout, plans, expected)


@pytest.mark.parametrize(
    "layout",
    [
        "DP2",
        "DP4+ZeRO-1",
        "DP8",
        "TP2+SPxDP2",
        "PP2xDP2",
        "PP2xDP4",
        "PP2 interleavedxDP2",
    ],
)
def test_megatrons_scheduler_equals_one_rank(
    ranks: Ranks, tree: dict[str, Any], layout: str
) -> None:
    _, num_ranks, parallel = LAYOUTS[layout]
    stages = parallel.get("pipeline_model_parallel_size", 1)
    chunks = parallel.get("virtual_pipeline_model_parallel_size", 1)
    plans = []
    for lengths in MEGATRON_BATCHES.values():
        plan = plan_hybrid_cp(
            lengths,
            num_ranks=num_ranks,
            tokens_per_rank=CAPACITY,
            num_pipeline_stages=stages,
            num_micro_batches_multiple=stages if chunks > 1 else 1,
        )
        check_order(plan, num_pipeline_stages=stages, num_model_chunks=chunks)
        plans.append(plan)
    expected = expected_of(ranks, tree, [plan.lengths for plan in plans])
    check_plans(ranks, tree, layout, plans, expected)


def random_plan(
    generator: random.Random, num_ranks: int, *, one_index: bool, offload: bool
) -> StepPlan:
    """Any valid plan: sequences on random ranks, cut anywhere, in micro-batches as they come.

    Sequences are drawn one after the other, each into the last or a new micro-batch of its ranks;
    a sequence that is shared opens new ones, so that meetings follow one order. With one_index all
    ranks of a shared sequence have it at one index, filled up with empty micro-batches.
    """
    micro_batches: list[list[list[Piece]]] = [[] for _ in range(num_ranks)]
    lengths = []
    for sequence in range(generator.randint(1, 8)):
        length = generator.choice([0, 1, 2, 7, 30, 64])
        lengths.append(length)
        members = generator.sample(range(num_ranks), generator.randint(1, num_ranks))
        parts = 2 * len(members)
        borders = sorted(generator.randint(0, length) for _ in range(parts - 1))
        ends = [*borders, length]
        starts = [0, *borders]
        pieces: dict[int, list[Piece]] = {rank: [] for rank in members}
        for start, end in zip(starts, ends, strict=True):
            if end > start:
                pieces[generator.choice(members)].append(Piece(sequence, start, end))
        holders = [rank for rank in members if pieces[rank]]
        if len(holders) > 1:
            index = max(len(micro_batches[rank]) for rank in holders)
            for rank in holders:
                while one_index and len(micro_batches[rank]) < index:
                    micro_batches[rank].append([])
                micro_batches[rank].append(pieces[rank])
        elif holders:
            (rank,) = holders
            if not micro_batches[rank] or generator.random() < 0.4:
                micro_batches[rank].append([])
            micro_batches[rank][-1] += pieces[rank]
    return StepPlan(
        lengths=tuple(lengths),
        tokens_per_rank=1024,
        micro_batches=tuple(
            tuple(
                MicroBatch(tuple(batch), generator.random() if offload else 0.0)
                for batch in batches
            )
            for batches in micro_batches
        ),
    )


@pytest.mark.parametrize("layout", ["DP2", "DP4+ZeRO-1", "PP2xDP2", "TP2+SPxDP2", "DP2, offload"])
def test_random_plans_equal_one_rank(ranks: Ranks, tree: dict[str, Any], layout: str) -> None:
    _, num_ranks, parallel = LAYOUTS[layout]
    generator = random.Random(layout)
    plans = [
        random_plan(
            generator,
            num_ranks,
            one_index="pipeline_model_parallel_size" in parallel,
            offload="offload_activations" in parallel,
        )
        for _ in range(10)
    ]
    assert any(len(batch.pieces) > 1 for p in plans for rank in p.micro_batches for batch in rank)
    expected = expected_of(ranks, tree, [plan.lengths for plan in plans])
    check_plans(ranks, tree, layout, plans, expected)
