"""Noise on logits: the formulas, and the running figures of the warm-up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.gate.noise import LogitSums, noisy_logits, warmup_logits
from moe.gate.random_numbers import normal, token_keys

KEYS = token_keys(torch.arange(50), seed=0, step=0, layer=0)


def test_noisy_logits_are_shazeers() -> None:
    logits, widths = torch.randn(50, 4), torch.randn(50, 4, requires_grad=True)
    found = noisy_logits(logits, widths, keys=KEYS)
    noise = normal(KEYS, 4)
    torch.testing.assert_close(found, logits + noise * (1 + widths.exp()).log())
    (grad,) = torch.autograd.grad(found.sum(), widths)
    torch.testing.assert_close(grad, noise * widths.sigmoid())


def test_warm_up_goes_from_noise_to_logits() -> None:
    logits, statistics = torch.randn(50, 4), torch.tensor([3.0, 0.5])
    noise = 3.0 + 0.5 * normal(KEYS, 4)
    for share in (0.0, 0.25, 1.0):
        found = warmup_logits(logits, share=share, statistics=statistics, keys=KEYS)
        torch.testing.assert_close(found, share * logits + (1 - share) * noise)


@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_figures_of_parts_add_up(sizes: list[int], seed: int) -> None:
    logits = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed)) + 2.0
    statistics = torch.tensor([0.5, 1.5])
    parts = sum(
        (LogitSums.of(part).sums for part in torch.split(logits, sizes)), torch.zeros(3).double()
    )
    found = LogitSums(parts).into(statistics)
    if len(logits):
        figures = torch.stack([logits.mean(), logits.std(correction=0)])
        statistics = 0.9 * statistics + 0.1 * figures
    assert found.tolist() == pytest.approx(statistics.tolist(), rel=1e-5)
