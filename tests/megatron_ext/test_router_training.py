"""Routers in a run: N ranks equal one, what they carry over steps is saved, noise is reproducible.

Tolerances as in test_moe_equals_single; ties between experts did not occur with these seeds in the
few steps that are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron_ext.layout_settings import EP2, PLAIN, PP2, SP, TP2, ZERO1
from tests.megatron_ext.test_moe_equals_single import norm_of
from tests.megatron_ext.test_parallel_equals_single import merged
from tests.megatron_ext.test_resume import resume_train, train_save_train
from tests.megatron_ext.tiny_run import opened, tiny_tree, train_and_report
from tests.rank_pool import Ranks

NUM_STEPS = 3
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_layer_freq": [0, 1, 0, 1],
}
RECOMPUTED = {"recompute_granularity": "full"}
ROUTERS: dict[str, dict[str, Any]] = {
    "deepseek": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.01,
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
    },
    "x_moe": {"moe_router_type": "x_moe", "moe_router_projection_size": 3},
    "noisy": {"moe_router_type": "noisy_topk"},
    "warm-up": {"moe_router_warmup_steps": 4},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, EP2 | PLAIN),
    "EP2xTP2+SP": (2, EP2 | TP2 | SP | ZERO1),
    "EP2xPP2": (4, EP2 | PP2 | PLAIN),
    "EP2 recomputed": (2, EP2 | PLAIN | RECOMPUTED),
}
BATCH = {"train_iters": 20, "global_batch_tokens": 512, "eval_interval": 0, "seed": 3}


def tree(corpus: Path, run_dir: Path, name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    return tiny_tree(corpus, run_dir, parallel=parallel, moe=EXPERTS | ROUTERS[name], train=BATCH)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("deepseek", "EP2xPP2"),
        ("x_moe", "EP2xTP2+SP"),
        ("noisy", "EP2 recomputed"),
        ("noisy", "EP2xTP2+SP"),
        ("warm-up", "EP2"),
    ],
)
def test_ranks_equal_single_rank(
    ranks: Ranks, corpus: Path, tmp_path: Path, name: str, layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    single = tree(corpus, tmp_path / "single", name, PLAIN)
    several = tree(corpus, tmp_path / "several", name, parallel)
    expected = ranks.run(1, train_and_report, single, NUM_STEPS, megatron=True)[0]
    reports = ranks.run(world_size, train_and_report, several, NUM_STEPS, megatron=True)
    for step in range(NUM_STEPS):
        for report in reports:
            assert report["losses"][step] == pytest.approx(expected["losses"][step], abs=1e-5)
        grads = merged(reports, "grads", step)
        wanted = expected["grads"][step]
        assert grads.keys() == wanted.keys()
        for kind, factor in (("experts", 1), ("router", 10), ("", 1)):
            chosen = {n: g for n, g in wanted.items() if kind in n}
            difference = norm_of(grads[n] - g for n, g in chosen.items())
            assert difference <= factor * 1e-5 * norm_of(chosen.values()), f"{kind}, step {step}"


def train_and_read(tree: dict[str, Any], num_steps: int) -> list[dict[int, dict[str, Tensor]]]:
    """After each step the buffers of this rank's routers, and the demand that was seen."""
    from megatron_ext import trainer

    found = []
    with opened(tree) as run:
        for _ in range(num_steps):
            trainer.train_step(run)
            found.append(
                {
                    row: {n: b.clone() for n, b in router.named_buffers()}
                    for row, router in run.balance.routers.items()
                }
            )
    return found


def test_bias_follows_the_whole_batch(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    several = tree(corpus, tmp_path / "run", "deepseek", EP2 | PLAIN)
    reports = ranks.run(2, train_and_read, several, 2, megatron=True)
    bias = torch.zeros(2, 4)
    for step in range(2):
        for row in range(2):
            demand = reports[0][step][row]["last_demand"]
            assert int(demand.sum()) > 0
            lack = demand.double().mean() - demand
            bias[row] += 0.01 * lack.sign()
            for report in reports:
                assert torch.equal(report[step][row]["last_demand"], demand)
                torch.testing.assert_close(report[step][row]["expert_bias"], bias[row])
    assert bool(bias.any())


@pytest.mark.parametrize("name", ["deepseek", "noisy", "warm-up"])
def test_a_resumed_run_goes_on_bit_by_bit(
    ranks: Ranks, corpus: Path, tmp_path: Path, name: str
) -> None:
    same = tree(corpus, tmp_path / "run", name, EP2 | ZERO1)
    expected = ranks.run(2, train_save_train, same, 2, 2, megatron=True)
    found = ranks.run(2, resume_train, same, 2, megatron=True)
    assert found == expected


def losses_with_capacity(tree: dict[str, Any]) -> dict[str, Any]:
    """Of a step: the loss, what was refused, and held-out losses before it."""
    from megatron_ext import trainer
    from megatron_ext.validation import validate

    with opened(tree) as run:
        held_out = validate(run)["validation_loss"]
        loss = trainer.train_step(run)["loss"]
        step = run.balance.step
        return {
            "held out": held_out,
            "loss": loss,
            "counts": step.counts.sum(dim=1).tolist(),
            "demand": step.demand.sum(dim=1).tolist(),
            "tokens": run.tokens,
        }


def test_capacity_drops_in_training_only(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    def report(**fields: Any) -> list[dict[str, Any]]:
        limited = tiny_tree(
            corpus,
            tmp_path / "run",
            parallel=EP2 | PLAIN,
            moe=EXPERTS | fields,
            train=BATCH | {"eval_tokens": 300},
        )
        return ranks.run(2, losses_with_capacity, limited, megatron=True)

    free = report()[0]
    assert free["counts"] == free["demand"] == [2 * free["tokens"]] * 2
    limit = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "random"}
    limited = report(**limit)
    assert limited == report(**limit), "the same again"
    for found in limited:
        assert found["held out"] == pytest.approx(free["held out"], abs=1e-6)
        assert found["demand"][0] == 2 * found["tokens"]
        # Each rank's experts take half of an even share, rounded up, or all they are offered.
        assert max(found["counts"]) <= found["tokens"] + 2 * 4
        assert found["loss"] != free["loss"]


def test_expert_choice_trains(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    chosen = tiny_tree(
        corpus,
        tmp_path / "run",
        parallel=EP2 | PLAIN,
        moe=EXPERTS | {"moe_router_type": "expert_choice"},
        train=BATCH | {"eval_tokens": 300},
    )
    for found in ranks.run(2, losses_with_capacity, chosen, megatron=True):
        assert found["counts"] == found["demand"]
        assert 2 * found["tokens"] <= found["counts"][0] <= 2 * found["tokens"] + 2 * 4
