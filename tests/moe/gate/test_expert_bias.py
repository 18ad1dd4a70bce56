"""The bias follows the load: a step of fixed size towards whoever has too few tokens."""

from __future__ import annotations

import torch

from moe.gate.expert_bias import updated_bias
from moe.router import RouterOptions, route


def test_sign_rule() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    found = updated_bias(bias, torch.tensor([7, 2, 5, 6]), rate=0.25)
    assert found.tolist() == [0.25, 0.25, -0.5, -0.25]


def test_whoever_has_the_mean_stays_exactly() -> None:
    # The mean, 1/3 of 2**40 + 1 tokens, is no float32.
    counts = torch.tensor([2**40, 2**40 + 1, 2**40 - 1])
    assert updated_bias(torch.zeros(3), counts, rate=1.0).tolist() == [0.0, -1.0, 1.0]
    assert (
        updated_bias(torch.ones(3), torch.zeros(3, dtype=torch.int64), rate=1.0).tolist() == [1] * 3
    )


def test_it_evens_out_a_router_that_has_one_idea() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 8, generator=generator) + 2.0 * torch.randn(8, generator=generator)
    options, bias = RouterOptions(topk=2, score_function="sigmoid"), torch.zeros(8)
    first = route(logits, options, bias=bias).counts
    for _ in range(400):
        bias = updated_bias(bias, route(logits, options, bias=bias).counts, rate=5e-3)
    last = route(logits, options, bias=bias).counts
    assert int(first.max()) > 2 * 128
    assert int(last.max()) < 1.2 * 128
    assert int(last.min()) > 0.8 * 128
