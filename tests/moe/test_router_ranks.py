"""Every router on one and two ranks: the layer is the dense loop over its own choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.exact import ExactDispatcher
from moe.dispatch.hooks import Hooks
from moe.dispatch.local import LocalDispatcher
from moe.experts import run_experts
from moe.gate.cosine import cosine_logits
from moe.gate.noise import noisy_logits, warmup_logits
from moe.gate.random_numbers import token_keys
from moe.records import Routing
from moe.reference import dense_loop
from moe.router import RouterOptions, route, router_logits
from tests.rank_pool import Ranks

NUM_EXPERTS, HIDDEN, FFN = 6, 8, 12
ROUTERS = {
    "softmax": RouterOptions(topk=2),
    "softmax not renormalised": RouterOptions(topk=1, is_renormalised=False),
    "sigmoid": RouterOptions(topk=2, score_function="sigmoid", scaling_factor=2.5),
    "groups": RouterOptions(topk=2, num_groups=3, group_topk=2),
    "x_moe": RouterOptions(topk=2),
    "noisy": RouterOptions(topk=2),
    "warm-up": RouterOptions(topk=2),
    "expert choice": RouterOptions(topk=2, is_expert_choice=True),
    "capacity, probs": RouterOptions(topk=2, capacity_factor=0.8),
    "capacity, position": RouterOptions(topk=2, capacity_factor=0.8, drop_policy="position"),
    "capacity, random": RouterOptions(topk=2, capacity_factor=0.5, drop_policy="random"),
    "capacity of hardly anybody": RouterOptions(topk=2, capacity_factor=1e-6),
}
# Tokens of each rank. "to one" and "none" push logits about.
SPLITS = {
    "even": [12, 12],
    "uneven": [17, 3],
    "none on one rank": [0, 9],
    "one token": [0, 1],
    "all to one": [8, 8],
    "none for one": [8, 8],
}


def weights() -> list[Tensor]:
    """Router (and what X-MoE and Shazeer's noise have besides), fc1, fc2; in float64."""
    generator = torch.Generator().manual_seed(3)
    shapes: list[tuple[int, ...]]
    shapes = [(NUM_EXPERTS, HIDDEN), (3, HIDDEN), (NUM_EXPERTS, 3), (NUM_EXPERTS, HIDDEN)]
    shapes += [(NUM_EXPERTS, 2 * FFN, HIDDEN), (NUM_EXPERTS, HIDDEN, FFN)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def choose(name: str, split: str, tokens: Tensor, first: int, parts: list[Tensor]) -> Routing:
    """As `megatron_ext.moe_router` does it."""
    options = ROUTERS[name]
    linear, projection, embeddings, noise = parts
    keys = token_keys(torch.arange(first, first + len(tokens)), seed=1, step=2, layer=3)
    if name == "x_moe":
        scale = torch.ones(1)
        logits = cosine_logits(tokens, projection, embeddings, scale, temperature=0.3)
    else:
        logits = router_logits(tokens, linear)
    push = torch.zeros(NUM_EXPERTS)
    push[0] = {"all to one": 100.0, "none for one": -100.0}.get(split, 0.0)
    logits = logits + push
    noisy = None
    if name == "noisy":
        noisy = noisy_logits(logits, router_logits(tokens, noise), keys=keys)
    elif name == "warm-up":
        figures = torch.tensor([0.0, 1.0])
        noisy = warmup_logits(logits, share=0.3, statistics=figures, keys=keys)
    bias = torch.linspace(-0.2, 0.2, NUM_EXPERTS) if name == "sigmoid" else None
    return route(logits, options, noisy_logits=noisy, bias=bias, keys=keys)


def tokens_and_grad(num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(num_tokens, HIDDEN, generator=generator).double() for _ in range(2)]


def spread(name: str) -> dict[str, dict[str, Any]]:
    """This rank's part of every split."""
    return {split: spread_one(name, split) for split in SPLITS}


def spread_one(name: str, split: str) -> dict[str, Any]:
    """Its tokens, all routers, its experts."""
    lengths, rank, size = SPLITS[split], dist.get_rank(), dist.get_world_size()
    if size == 1:
        lengths = [sum(lengths)]
    first = sum(lengths[:rank])
    tokens, grad = (whole[first : first + lengths[rank]] for whole in tokens_and_grad(sum(lengths)))
    num_local = NUM_EXPERTS // size
    mine = slice(rank * num_local, (rank + 1) * num_local)
    *router, fc1, fc2 = weights()
    leaves = [t.clone().requires_grad_() for t in (tokens, *router, fc1[mine], fc2[mine])]
    routing = choose(name, split, leaves[0], first, leaves[1:5])
    group = dist.group.WORLD
    assert group is not None
    dispatcher = LocalDispatcher() if size == 1 else ExactDispatcher(group)
    trip = dispatcher.dispatch(leaves[0], routing, Hooks())
    output = trip.combine(run_experts(trip.rows, trip.counts, leaves[5], leaves[6]))
    grads = torch.autograd.grad(output, leaves, grad, allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
    return {"output": output.detach(), "grads": found, "counts": routing.counts.tolist()}


def whole(name: str, split: str, lengths: list[int]) -> dict[str, Any]:
    """Each rank's micro-batch routed on its own, all experts in a dense loop."""
    tokens, grad = tokens_and_grad(sum(lengths))
    leaves = [t.clone().requires_grad_() for t in (tokens, *weights())]
    outputs, first = [], 0
    for part in torch.split(leaves[0], lengths):
        routing = choose(name, split, part, first, leaves[1:5])
        outputs.append(dense_loop(part, routing, leaves[5], leaves[6]))
        first += len(part)
    output = torch.cat(outputs)
    grads = torch.autograd.grad(output, leaves, grad, allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
    return {"output": output.detach(), "grads": found}


def check(name: str, split: str, reports: list[dict[str, Any]]) -> None:
    lengths = SPLITS[split] if len(reports) > 1 else [sum(SPLITS[split])]
    expected = whole(name, split, lengths)
    # Weights are float32, whatever else is float64.
    where = f"{name}, {split}"
    output = torch.cat([report["output"] for report in reports])
    torch.testing.assert_close(output, expected["output"], rtol=1e-5, atol=1e-5, msg=where)
    for index, wanted in enumerate(expected["grads"]):
        parts = [report["grads"][index] for report in reports]
        # Tokens and experts are spread, the router is summed over ranks.
        is_spread = index in (0, 5, 6)
        found = torch.cat(parts) if is_spread else torch.stack(parts).sum(dim=0)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=where)
    limit = ROUTERS[name].capacity_factor
    for report, length in zip(reports, lengths, strict=True):
        if limit is None and not ROUTERS[name].is_expert_choice:
            assert sum(report["counts"]) == length * ROUTERS[name].topk, "tokens are conserved"


@pytest.mark.parametrize("name", ROUTERS)
def test_layer_is_the_dense_loop_on_one_rank_and_two(ranks: Ranks, name: str) -> None:
    for world_size in (1, 2):
        reports = ranks.run(world_size, spread, name)
        for split in SPLITS:
            check(name, split, [report[split] for report in reports])


def test_pushes_do_what_they_say() -> None:
    tokens, _ = tokens_and_grad(16)
    parts = weights()[:4]
    assert choose("softmax", "all to one", tokens, 0, parts).counts[0] == 16
    assert choose("softmax", "none for one", tokens, 0, parts).counts[0] == 0
