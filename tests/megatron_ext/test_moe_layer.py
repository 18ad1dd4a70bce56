"""The layer as megatron builds it is the dense loop over experts, for the tokens and no padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron_ext.tiny_run import opened, tiny_tree
from tests.rank_pool import Ranks

COEFF = 0.5
MOE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_z_loss_coeff": COEFF,
}
MODELS: dict[str, dict[str, Any]] = {
    "renormalised": MOE,
    "not renormalised": MOE | {"moe_router_pre_softmax": True, "moe_router_topk": 1},
    "shared": MOE
    | {"moe_shared_expert_intermediate_size": 40, "moe_router_topk_scaling_factor": 2.0},
}


def check_layer(tree: dict[str, Any], num_tokens: int) -> None:
    import numpy as np
    import torch
    import torch.nn.functional as F

    from megatron_ext.model import unwrap
    from moe.reference import dense_loop
    from moe.router import softmax_topk, z_loss

    with opened(tree) as run:
        moe = run.config.moe
        layers = unwrap(run.chunks[0]).decoder.layers
        assert not hasattr(layers[0].mlp, "experts")
        layer = layers[1].mlp
        batch = run.reader.to_device(run.reader.single(np.arange(num_tokens)))
        num_rows = batch.tokens.numel()
        assert num_rows > num_tokens
        # Larger weights than a model starts with, so that each term is seen.
        with torch.no_grad():
            for weight in layer.parameters():
                weight.mul_(20.0)
        hidden = torch.randn(num_rows, 1, 32, requires_grad=True)
        grad = torch.randn(num_rows, 1, 32)
        leaves = [hidden, layer.router.weight, layer.experts.linear_fc1, layer.experts.linear_fc2]
        output, bias = layer(hidden, padding_mask=batch.documents)
        assert bias is None
        found = [output.detach(), *torch.autograd.grad(output, leaves, grad)]

        tokens = hidden[:num_tokens, 0]
        logits = tokens @ layer.router.weight.T
        routing = softmax_topk(
            logits,
            topk=moe.moe_router_topk,
            is_renormalised=not moe.moe_router_pre_softmax,
            scaling_factor=moe.moe_router_topk_scaling_factor or 1.0,
        )
        routed = dense_loop(tokens, routing, *leaves[2:])
        expected = F.pad(routed, (0, 0, 0, num_rows - num_tokens))[:, None]
        if moe.moe_shared_expert_intermediate_size:
            shared = layer.shared_experts
            gate, up = (hidden @ shared.linear_fc1.weight.T).chunk(2, dim=-1)
            expected = expected + (F.silu(gate) * up) @ shared.linear_fc2.weight.T
        loss = (expected * grad).sum() + COEFF * z_loss(logits)
        wanted = [expected.detach(), *torch.autograd.grad(loss, leaves)]
        for value, wanted_value in zip(found, wanted, strict=True):
            # Sums of some hundred terms in float32.
            scale = float(wanted_value.abs().max())
            torch.testing.assert_close(value, wanted_value, rtol=0, atol=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("name", MODELS)
def test_layer_is_the_dense_loop(ranks: Ranks, corpus: Path, name: str) -> None:
    tree = tiny_tree(corpus, corpus.parent / "run", moe=MODELS[name])
    ranks.run(1, check_layer, tree, 70, megatron=True)


def marks(tree: dict[str, Any]) -> dict[str, Any]:
    """What megatron does with each kind of parameter."""
    from megatron_ext.model import unwrap

    with opened(tree) as run:
        wrapped = run.chunks[0]
        layer = unwrap(wrapped).decoder.layers[1].mlp
        expert_parameters = [
            parameter for buffer in wrapped.expert_parallel_buffers for parameter in buffer.params
        ]
        names = {parameter: name for name, parameter in wrapped.named_parameters()}
        return {
            "experts": sorted({names[p].split(".mlp.")[1] for p in expert_parameters}),
            "fc1": tuple(layer.experts.linear_fc1.shape),
            "num_optimizers": len(run.optimizer.chained_optimizers),
            "plan ranks": run.config.parallel.num_expert_data_ranks,
        }


def test_experts_are_reduced_apart(ranks: Ranks, corpus: Path) -> None:
    def report(world_size: int, **parallel: Any) -> Any:
        tree = tiny_tree(corpus, corpus.parent / "run", parallel=parallel, moe=MOE)
        return ranks.run(world_size, marks, tree, megatron=True)[0]

    experts = ["experts.linear_fc1", "experts.linear_fc2"]
    assert report(1) == {
        "experts": experts,
        "fc1": (4, 48, 32),
        "num_optimizers": 2,
        "plan ranks": 1,
    }
    assert report(2, expert_model_parallel_size=2) == {
        "experts": experts,
        "fc1": (2, 48, 32),
        "num_optimizers": 2,
        "plan ranks": 2,
    }
    tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert report(4, expert_model_parallel_size=4, **tensor)["plan ranks"] == 2
    assert report(2, expert_model_parallel_size=2, **tensor)["plan ranks"] == 1
