"""megatron-core's own `global_aux_loss` is not the formula; ours passes the same check.

The check: the gradient that balance adds to the router, summed over ranks and divided by the
batch's tokens as megatron does with calculate_per_token_loss, is that of E sum_i f_i P_i over all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.megatron_ext.tiny_run import make_corpus, opened, tiny_tree
from tests.rank_pool import Ranks

NUM_EXPERTS, TOPK, HIDDEN_SIZE = 4, 2, 32
COEFF = 0.5
MOE: dict[str, Any] = {
    "num_moe_experts": NUM_EXPERTS,
    "moe_router_topk": TOPK,
    "moe_ffn_hidden_size": 16,
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_aux_loss_coeff": COEFF,
}


def tokens_of(rank: int, micro_batch: int, num_tokens: int) -> Tensor:
    """Others on each rank, with a lean that the gate turns into an uneven load."""
    generator = torch.Generator().manual_seed(100 * rank + micro_batch)
    return torch.randn(num_tokens, HIDDEN_SIZE, generator=generator) + 0.3


def weight() -> Tensor:
    return 0.2 * torch.randn(NUM_EXPERTS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(7))


def megatrons_gradient(tree: dict[str, Any], num_tokens: list[list[int]]) -> Tensor:
    """Of the router's weight, by megatron's TopKRouter; num_tokens[rank][micro-batch]."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_ext.model import unwrap

    # 0.16.1 asks whether this is None and does not define it without Transformer Engine.
    if not hasattr(moe_utils, "te_general_gemm"):
        setattr(moe_utils, "te_general_gemm", None)  # noqa: B010
    with opened(tree) as run:
        config = unwrap(run.chunks[0]).config
        assert config.calculate_per_token_loss
        config.moe_router_load_balancing_type = "global_aux_loss"
        config.moe_aux_loss_coeff = COEFF
        router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
        router.set_layer_number(1)
        with torch.no_grad():
            router.weight.copy_(weight())
        # What its schedules set with calculate_per_token_loss.
        moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
        for index, number in enumerate(num_tokens[run.mesh.rank]):
            tokens = tokens_of(run.mesh.rank, index, number)
            probabilities, _ = router(tokens[:, None])
            # The loss of the model itself has no part in this.
            (probabilities.sum() * 0.0).backward()
        gradient: Tensor = router.weight.grad.float()
        dist.all_reduce(gradient)
        return gradient / sum(map(sum, num_tokens))


def our_gradient(tree: dict[str, Any], num_tokens: list[list[int]]) -> Tensor:
    """The same by our router and the end of a step."""
    with opened(tree) as run:
        balance = run.balance
        for chunk in run.chunks:
            chunk.zero_grad_buffer()
        router = balance.routers[0]
        with torch.no_grad():
            router.weight.copy_(weight())
        for index, number in enumerate(num_tokens[run.mesh.rank]):
            routing = router(tokens_of(run.mesh.rank, index, number))
            (routing.weights.sum() * 0.0).backward()
        total = torch.tensor(sum(num_tokens[run.mesh.rank]), dtype=torch.int)
        balance._finalize(run.chunks, total)
        gradient: Tensor = router.weight.main_grad.clone()
        return gradient


def formula(num_tokens: list[list[int]]) -> Tensor:
    tokens = torch.cat(
        [
            tokens_of(rank, index, number)
            for rank, numbers in enumerate(num_tokens)
            for index, number in enumerate(numbers)
        ]
    )
    exact = weight().double().requires_grad_()
    logits = tokens.double() @ exact.T
    chosen = logits.topk(TOPK, dim=-1).indices.reshape(-1)
    f = torch.bincount(chosen, minlength=NUM_EXPERTS).double() / len(chosen)
    loss = NUM_EXPERTS * (f * logits.softmax(dim=-1).mean(dim=0)).sum()
    return torch.autograd.grad(COEFF * loss, exact)[0]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


EVEN = [[50], [50], [50], [50]]
CUT = [[50, 50], [50, 50], [50, 50], [50, 50]]
UNEVEN = [[90, 10], [90, 10], [90, 10], [90, 10]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"))
    return tiny_tree(
        corpus,
        corpus.parent / "run",
        model={"num_layers": 1},
        moe=MOE,
        parallel={"use_distributed_optimizer": False},
    )


@pytest.mark.parametrize("num_tokens", [EVEN, CUT, UNEVEN], ids=["even", "cut", "uneven"])
def test_ours_is_the_formula(
    ranks: Ranks, tree: dict[str, Any], num_tokens: list[list[int]]
) -> None:
    for found in ranks.run(4, our_gradient, tree, num_tokens, megatron=True):
        assert error(found, formula(num_tokens)) <= 1e-6


def test_ours_takes_unequal_numbers_of_micro_batches(ranks: Ranks, tree: dict[str, Any]) -> None:
    num_tokens = [[50, 3, 20], [7], [], [90, 40]]
    for found in ranks.run(4, our_gradient, tree, num_tokens, megatron=True):
        assert error(found, formula(num_tokens)) <= 1e-6


def test_megatrons_is_too_weak_by_the_number_of_ranks(ranks: Ranks, tree: dict[str, Any]) -> None:
    wanted = formula(EVEN)
    for found in ranks.run(4, megatrons_gradient, tree, EVEN, megatron=True):
        assert error(found, wanted) == pytest.approx(0.75, abs=1e-4)
        assert error(found * 4, wanted) <= 1e-5, "a quarter of it, on four ranks"
    (alone,) = ranks.run(1, megatrons_gradient, tree, EVEN[:1], megatron=True)
    assert error(alone, formula(EVEN[:1])) <= 1e-5, "right on one rank, so the check is fair"


@pytest.mark.parametrize("num_tokens", [CUT, UNEVEN], ids=["cut", "uneven"])
def test_megatrons_depends_on_the_cut(
    ranks: Ranks, tree: dict[str, Any], num_tokens: list[list[int]]
) -> None:
    """Also with the factor put right: its f is of the micro-batches so far."""
    (found, *_) = ranks.run(4, megatrons_gradient, tree, num_tokens, megatron=True)
    assert error(found * 4, formula(num_tokens)) > 1e-3
