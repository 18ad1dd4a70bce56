"""The global-batch balance loss is the paper's formula over the whole batch, on any plan.

`balance_terms` takes from real steps what each router was given and what was added to its gradient
for balance; the formula is then computed in float64 by one process over the tokens of all ranks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.plan.hdp import plan_hdp
from parallel.plan.records import MicroBatch, StepPlan
from tests.megatron_ext.layout_settings import EP2, PLAIN, PP2, SP, TP2, VPP2
from tests.megatron_ext.planned_step import RandomTexts, single_plan
from tests.megatron_ext.test_hdp_equals_single import BATCHES, CAPACITY, COSTS, random_plan
from tests.megatron_ext.test_moe_equals_single import RECOMPUTE
from tests.megatron_ext.tiny_run import opened, tiny_tree
from tests.rank_pool import Ranks

# Of the router's own gradient; so large that its float32 sum with all others loses none of it.
COEFF, DEVICE_COEFF, NUM_GROUPS = 200.0, 70.0, 2
TOPK, NUM_EXPERTS = 2, 4
TOLERANCE = 1e-6
MOE: dict[str, Any] = {
    "num_moe_experts": NUM_EXPERTS,
    "moe_router_topk": TOPK,
    "moe_ffn_hidden_size": 32,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_aux_loss_coeff": COEFF,
    "moe_device_aux_loss_coeff": DEVICE_COEFF,
    "moe_device_aux_loss_num_groups": NUM_GROUPS,
}
OVERLAPPED = {"overlap_grad_reduce": True, "ddp_bucket_size": 4000}

# (ranks, data-parallel ranks among them, those that exchange tokens, settings)
LAYOUTS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "one rank": (1, 1, 1, PLAIN),
    "DP2": (2, 2, 1, PLAIN),
    "DP3+ZeRO-1": (3, 3, 1, {}),
    "DP4+ZeRO-1 overlapped, full recomputation": (
        4,
        4,
        1,
        OVERLAPPED | {"recompute_granularity": "full"},
    ),
    "EP2xDP2, recomputation": (4, 4, 2, EP2 | PLAIN | RECOMPUTE),
    "EP2xTP2+SPxDP2": (4, 2, 1, EP2 | TP2 | SP | PLAIN),
    "EP2xPP2 interleaved+ZeRO-1": (4, 2, 2, EP2 | PP2 | VPP2),
    "DP8+ZeRO-1": (8, 8, 1, {}),
}


def balance_terms(tree: dict[str, Any], plans: Sequence[StepPlan]) -> list[dict[int, Any]]:
    """For each plan, for each layer with experts on this rank, what it was given and got."""
    from megatron_ext.step import run_micro_batches
    from megatron_ext.training_data import SequenceRef

    with opened(tree) as run:
        balance = run.balance
        given: dict[int, list[Tensor]] = {row: [] for row in balance.routers}
        others: dict[int, Tensor] = {}
        finalize = balance._finalize_others

        def finalize_others(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            for row, router in balance.routers.items():
                others[row] = router.weight.main_grad.clone()

        balance._finalize_others = finalize_others
        for row, router in balance.routers.items():

            def take(_: Any, args: Any, row: int = row) -> None:
                if torch.is_grad_enabled():
                    given[row].append(args[0].detach())

            router.register_forward_pre_hook(take)
            with torch.no_grad():
                # Larger than a model starts with, so that experts are chosen unevenly; but not
                # sure of one, where float32 has few digits of 1 - p.
                router.weight.mul_(8.0)
        found = []
        for plan in plans:
            for chunk in run.chunks:
                chunk.zero_grad_buffer()
            refs = [SequenceRef(0, index) for index in range(len(plan.lengths))]
            texts: Any = [RandomTexts(plan.lengths)]
            run_micro_batches(run.chunks, run.reader.read(plan, refs, texts), reader=run.reader)
            step = balance.step
            found.append(
                {
                    row: {
                        "given": torch.cat(given[row]),
                        "weight": router.weight.detach().clone(),
                        "term": router.weight.main_grad - others[row],
                        "counts": step.counts[row],
                        "demand": step.demand[row],
                        "probabilities": step.probabilities[row],
                        "losses": balance.losses(plan.num_tokens),
                    }
                    for row, router in balance.routers.items()
                }
            )
            for parts in given.values():
                parts.clear()
            assert all(beside.inputs.num_bytes == 0 for beside in balance._beside.values())
        return found


def formula(tokens: Tensor, weight: Tensor) -> tuple[Tensor, float, Tensor]:
    """(gradient in float64, LBL, choices of each expert) of one layer over a whole batch."""
    exact = weight.double().requires_grad_()
    logits = tokens.double() @ exact.T
    counts = torch.bincount(logits.topk(TOPK, dim=-1).indices.reshape(-1), minlength=NUM_EXPERTS)
    f = counts.double() / (TOPK * len(tokens))
    mean = logits.softmax(dim=-1).mean(dim=0)
    loss = NUM_EXPERTS * (f * mean).sum()
    groups = zip(f.chunk(NUM_GROUPS), mean.chunk(NUM_GROUPS), strict=True)
    device = sum((NUM_EXPERTS * f_d.mean() * mean_d.sum() for f_d, mean_d in groups), loss * 0)
    (gradient,) = torch.autograd.grad(COEFF * loss + DEVICE_COEFF * device, exact)
    return gradient, float(loss.detach()), counts


def check_formula(reports: list[list[dict[int, Any]]], plans: Sequence[StepPlan]) -> None:
    largest = 0.0
    for index, plan in enumerate(plans):
        sum_of_losses = 0.0
        for row in range(3):
            layers = [report[index][row] for report in reports if row in report[index]]
            tokens = torch.cat([layer["given"] for layer in layers])
            assert len(tokens) == plan.num_tokens, "every token once, on one rank"
            if not len(tokens):
                assert all(not layer["term"].any() for layer in layers)
                continue
            gradient, loss, counts = formula(tokens, layers[0]["weight"])
            sum_of_losses += loss
            for layer in layers:
                assert torch.equal(layer["counts"], counts)
                assert torch.equal(layer["demand"], counts)
                # A few tokens may happen to be spread evenly, which has no gradient.
                size = gradient.norm().clamp_min(1e-3 * COEFF)
                difference = (layer["term"].double() - gradient).norm() / size
                largest = max(largest, float(difference))
                assert difference <= TOLERANCE, f"row {row} of {plan}: {difference:.2e}"
        for layer in (layer for report in reports for layer in report[index].values()):
            logged = layer["losses"]["moe_global_aux_loss"]
            assert not plan.num_tokens or logged == pytest.approx(sum_of_losses, rel=1e-6)
    assert largest > 0.0


def plans_of(layout: str) -> list[StepPlan]:
    """Plans of the planner, and random ones with unequal tokens and micro-batches."""
    _, num_ranks, ep, parallel = LAYOUTS[layout]
    stages = parallel.get("pipeline_model_parallel_size", 1)
    multiple = stages if "virtual_pipeline_model_parallel_size" in parallel else 1
    plans = [
        plan_hdp(
            lengths,
            num_ranks=num_ranks,
            # The longest sequence fits all ranks together.
            tokens_per_rank=max(CAPACITY, 128 // num_ranks),
            cost_model=COSTS,
            num_pipeline_stages=stages,
            num_micro_batches_multiple=multiple,
            expert_parallel_size=ep,
        )
        for lengths in BATCHES.values()
    ]
    if multiple == 1:
        generator = random.Random(layout)
        plans += [
            filled_up(random_plan(generator, num_ranks, one_index=ep > 1, offload=False), ep)
            for _ in range(3)
        ]
    return plans


def filled_up(plan: StepPlan, expert_parallel_size: int) -> StepPlan:
    """With empty micro-batches, so that ranks that share experts have equally many."""
    filled = []
    for first in range(0, len(plan.micro_batches), expert_parallel_size):
        group = plan.micro_batches[first : first + expert_parallel_size]
        most = max(map(len, group))
        filled += [(*rank, *[MicroBatch(())] * (most - len(rank))) for rank in group]
    return replace(plan, micro_batches=tuple(filled))


def tree_of(corpus: Path, parallel: dict[str, Any], moe: dict[str, Any] = MOE) -> dict[str, Any]:
    return tiny_tree(
        corpus,
        corpus.parent / "run",
        parallel=parallel,
        moe=moe,
        data={"tokens_per_rank": CAPACITY, "max_sequence_length": CAPACITY},
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_the_formula(ranks: Ranks, corpus: Path, layout: str) -> None:
    world_size, _, _, parallel = LAYOUTS[layout]
    plans = plans_of(layout)
    if world_size == 1:
        plans.append(single_plan(BATCHES["mixed"]))
    reports = ranks.run(world_size, balance_terms, tree_of(corpus, parallel), plans, megatron=True)
    check_formula(reports, plans)
