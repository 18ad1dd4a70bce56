"""Lion against the paper's formula, alone and inside megatron's (distributed) optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron_ext.tiny_run import opened, tiny_tree, whole_tensors
from tests.rank_pool import Ranks

BETA1, BETA2, WEIGHT_DECAY = 0.9, 0.99, 0.1


def paper_step(
    parameter: Tensor, momentum: Tensor, grad: Tensor, *, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 of Chen et al. 2023, as it is written there."""
    update = torch.sign(BETA1 * momentum + (1 - BETA1) * grad)
    parameter = parameter - lr * (update + weight_decay * parameter)
    momentum = BETA2 * momentum + (1 - BETA2) * grad
    return parameter, momentum


def check_alone() -> None:
    from megatron_ext.optimizer import Lion

    # In float64 nothing is near enough to zero for its sign to depend on the order of rounding.
    decayed, plain, unused = (
        torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
        for shape in ((5, 3), (7,), (2,))
    )
    optimizer = Lion(
        [{"params": [decayed, unused]}, {"params": [plain], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(BETA1, BETA2),
        weight_decay=WEIGHT_DECAY,
    )
    before = unused.detach().clone()
    expected = {
        parameter: (parameter.detach().clone(), torch.zeros_like(parameter))
        for parameter in (decayed, plain)
    }
    for step in range(20):
        lr = 1e-2 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter, decay in ((decayed, WEIGHT_DECAY), (plain, 0.0)):
            grad = torch.randn_like(parameter)
            if step == 0:
                # A parameter without gradient and momentum moves by its decay alone.
                grad.view(-1)[0] = 0.0
            parameter.grad = grad
            expected[parameter] = paper_step(*expected[parameter], grad, lr=lr, weight_decay=decay)
        optimizer.step()
        for parameter, (value, momentum) in expected.items():
            found = optimizer.state[parameter]["exp_avg"]
            # A few roundings of numbers below 4 in each step.
            bound = 16 * (step + 1) * torch.finfo(torch.float64).eps
            assert float((parameter.detach() - value).abs().max()) <= bound
            assert float((found - momentum).abs().max()) <= bound
    assert torch.equal(unused.detach(), before), "no gradient, no change"


def test_equals_the_paper(ranks: Ranks) -> None:
    ranks.run(1, check_alone, megatron=True)


def train_and_follow(tree: dict[str, Any], num_steps: int) -> dict[str, tuple[float, float]]:
    """Per parameter: share of entries that moved as the formula says, and the largest error."""
    from megatron_ext import trainer
    from megatron_ext.learning_rate import learning_rate
    from megatron_ext.optimizer import clip_and_step

    grads: list[dict[str, Tensor]] = []
    with opened(tree) as run:
        weights = whole_tensors(run, "weight")

        def capture(optimizer: Any, *, clip_grad: float) -> tuple[float, bool]:
            optimizer.prepare_grads()
            grads.append(whole_tensors(run, "grad"))
            return clip_and_step(optimizer, clip_grad=clip_grad)

        trainer.clip_and_step = capture  # type: ignore[attr-defined]
        try:
            for _ in range(num_steps):
                trainer.train_step(run)
        finally:
            trainer.clip_and_step = clip_and_step  # type: ignore[attr-defined]
        found = whole_tensors(run, "weight")
        optim = run.config.optim
        expected = {name: (weight, torch.zeros_like(weight)) for name, weight in weights.items()}
        moved = {
            name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()
        }
        for step, step_grads in enumerate(grads):
            lr = learning_rate(step, optim, train_iters=run.config.train.train_iters)
            for name, grad in step_grads.items():
                weight, momentum = expected[name]
                # Signs of what is rounded near zero may go either way.
                update = BETA1 * momentum + (1 - BETA1) * grad
                moved[name] &= update.abs() > 1e-5 * update.abs().max()
                # Norms (one dim) are not decayed.
                decay = WEIGHT_DECAY if weight.dim() > 1 else 0.0
                expected[name] = paper_step(weight, momentum, grad, lr=lr, weight_decay=decay)
    return {
        name: (
            float(moved[name].float().mean()),
            float((found[name] - expected[name][0])[moved[name]].abs().max()),
        )
        for name in found
    }


@pytest.mark.parametrize("zero", [False, True], ids=["plain", "ZeRO-1"])
def test_a_run_moves_its_weights_as_the_paper_says(ranks: Ranks, corpus: Path, zero: bool) -> None:
    tree = tiny_tree(
        corpus,
        corpus.parent / "lion",
        optim={
            "optimizer": "lion",
            "lr": 1e-3,
            "lr_warmup_iters": 2,
            "lion_beta1": BETA1,
            "lion_beta2": BETA2,
            "weight_decay": WEIGHT_DECAY,
            "clip_grad": 0.0,
        },
        parallel={"use_distributed_optimizer": zero},
    )
    for report in ranks.run(2, train_and_follow, tree, 4, megatron=True):
        assert len(report) > 20
        for name, (share, error) in report.items():
            # Rows of the vocabulary that no text uses have almost no gradient.
            assert share > (0.1 if "embedding" in name or "output_layer" in name else 0.9), name
            # Four steps of float32 on weights around one.
            assert error <= 4 * 2 * torch.finfo(torch.float32).eps, name
