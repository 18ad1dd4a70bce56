"""What one router adds in a micro-batch is autograd of the formulas, and only training counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron_ext.planned_step import RandomTexts, single_plan
from tests.megatron_ext.tiny_run import opened, tiny_tree
from tests.rank_pool import Ranks

NUM_EXPERTS, TOPK = 4, 2
MICRO_BATCH, SEQUENCE, GLOBAL, DEVICE = 0.7, 0.3, 0.9, 0.4
LENGTHS = (30, 1, 17, 40)
LAST_DEMAND = (5, 1, 0, 2)
MOE: dict[str, Any] = {
    "num_moe_experts": NUM_EXPERTS,
    "moe_router_topk": TOPK,
    "moe_ffn_hidden_size": 16,
    "moe_layer_freq": [0, 1, 0, 1],
    "moe_router_load_balancing_type": ["global_aux_loss", "aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [GLOBAL, MICRO_BATCH, SEQUENCE],
    "moe_device_aux_loss_coeff": DEVICE,
    "moe_device_aux_loss_num_groups": 2,
}
KEYS = {
    f"moe_{name}" for name in ("global_aux_loss", "aux_loss", "seq_aux_loss", "device_aux_loss")
}


def lbl(probabilities: Tensor, experts: Tensor) -> Tensor:
    """E sum_i f_i P_i."""
    f = torch.bincount(experts.reshape(-1), minlength=NUM_EXPERTS) / experts.numel()
    return NUM_EXPERTS * (f * probabilities.mean(dim=0)).sum()


def check_router(tree: dict[str, Any]) -> None:
    from megatron_ext.training_data import SequenceRef

    with opened(tree) as run:
        balance, mesh = run.balance, run.mesh
        router = balance.routers[1]
        plan = single_plan(LENGTHS)
        refs, texts = [SequenceRef(0, index) for index in range(len(LENGTHS))], RandomTexts(LENGTHS)
        (host,) = run.reader.read(plan, refs, [texts])
        batch = run.reader.to_device(host)
        ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
        ids = torch.split(ids, batch.tokens.numel() // mesh.tensor_size)[mesh.tensor_rank]
        torch.manual_seed(mesh.tensor_rank)
        tokens = torch.randn(len(ids), 32, requires_grad=True)
        grad = torch.randn(len(ids), TOPK)
        with torch.no_grad():
            router.weight.mul_(20.0)
            router.last_demand.copy_(torch.tensor(LAST_DEMAND))
        routing = router(tokens, batch.documents)
        loss = (routing.weights * grad).sum()
        found = torch.autograd.grad(loss, [tokens, router.weight])

        def gate(x: Tensor, weight: Tensor) -> Tensor:
            return (x.double() @ weight.double().T).softmax(dim=-1)

        probabilities = gate(tokens, router.weight)
        chosen, experts = probabilities.topk(TOPK, dim=-1)
        wanted = (chosen / chosen.sum(dim=-1, keepdim=True) * grad).sum()
        wanted = wanted + MICRO_BATCH * len(ids) * lbl(probabilities, experts)
        for number in ids.unique():
            is_own = ids == number
            own = lbl(probabilities[is_own], experts[is_own])
            wanted = wanted + SEQUENCE * int(is_own.sum()) * own
        # Only into the hidden states, with the load of the step before.
        load = torch.tensor(LAST_DEMAND).double() / sum(LAST_DEMAND) * NUM_EXPERTS
        device = load.view(2, 2).mean(dim=1, keepdim=True).expand(2, 2).reshape(-1)
        trunk = gate(tokens, router.weight.detach()) @ (GLOBAL * load + DEVICE * device)
        expected = torch.autograd.grad(wanted + trunk.sum(), [tokens, router.weight])
        for value, expected_value in zip(found, expected, strict=True):
            difference = (value - expected_value).norm() / expected_value.norm()
            assert difference <= 1e-5, f"{difference:.2e}"
        # Whom a full expert refuses has wanted it all the same.
        excess = balance._statistics[1, -2:].clone()
        balance._statistics.zero_()
        router.options = replace(router.options, capacity_factor=0.5)
        assert int(router(tokens, batch.documents).dropped.sum()) > 0
        torch.testing.assert_close(balance._statistics[1, -2:], excess)


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_router_is_autograd_of_the_formulas(ranks: Ranks, corpus: Path, tensor_size: int) -> None:
    parallel = {"tensor_model_parallel_size": tensor_size, "sequence_parallel": tensor_size > 1}
    tree = tiny_tree(corpus, corpus.parent / "run", moe=MOE, parallel=parallel)
    ranks.run(tensor_size, check_router, tree, megatron=True)


def check_training(tree: dict[str, Any]) -> None:
    from megatron_ext.step import run_logits, run_micro_batches
    from megatron_ext.trainer import train_step
    from megatron_ext.validation import validate

    with opened(tree) as run:
        balance = run.balance
        record: Any = train_step(run)
        assert record.keys() >= KEYS
        # The router starts nearly indifferent: each of two layers has 1.
        assert all(float(record[key]) == pytest.approx(2.0, abs=0.1) for key in KEYS)
        step = balance.step
        assert step.layers == (1, 3)
        assert step.counts.sum(dim=1).tolist() == [record["tokens"] * TOPK] * 2
        assert torch.equal(balance.routers[0].last_demand, step.demand[0])
        validate(run)
        # Not told by eval() or no_grad() of its caller.
        batch = run.reader.single(torch.arange(20).numpy())
        run_micro_batches(run.chunks, [batch], reader=run.reader, forward_only=True)
        run_logits(run.chunks, batch, reader=run.reader, row=3)
        assert not balance._statistics.any()
        assert all(beside.inputs.num_bytes == 0 for beside in balance._beside.values())
        assert balance.step is step
        assert torch.equal(balance.routers[0].last_demand, step.demand[0])


@pytest.mark.parametrize("granularity", ["none", "full"])
def test_only_training_counts(ranks: Ranks, corpus: Path, granularity: str) -> None:
    tree = tiny_tree(
        corpus,
        corpus.parent / "run",
        moe=MOE,
        parallel={"recompute_granularity": granularity},
        train={"eval_tokens": 500},
    )
    ranks.run(1, check_training, tree, megatron=True)


def check_memory(tree: dict[str, Any]) -> None:
    """What is kept until the end of a step is num_tokens * hidden_size of the model's dtype."""
    from megatron_ext.trainer import train_step

    with opened(tree) as run:
        kept: list[int] = []
        balance = run.balance
        gradients = balance._gradients

        def measured() -> Any:
            kept.append(sum(beside.inputs.num_bytes for beside in balance._beside.values()))
            return gradients()

        balance._gradients = measured
        record: Any = train_step(run)
        num_layers, hidden_size = len(balance.routers), 32
        keepers = [beside.inputs for beside in balance._beside.values()]
        assert all(
            inputs.is_on_host == run.config.moe.moe_router_inputs_on_host for inputs in keepers
        )
        assert kept == [num_layers * record["tokens"] * hidden_size * run.device.dtype.itemsize]


@pytest.mark.parametrize(("dtype", "on_host"), [("fp32", True), ("bf16", False)])
def test_router_inputs_are_kept_in_the_models_dtype(
    ranks: Ranks, corpus: Path, dtype: str, on_host: bool
) -> None:
    moe = MOE | {"moe_router_inputs_on_host": on_host}
    tree = tiny_tree(corpus, corpus.parent / "run", moe=moe, precision={"dtype": dtype})
    ranks.run(1, check_memory, tree, megatron=True)
