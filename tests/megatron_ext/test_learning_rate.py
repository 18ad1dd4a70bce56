"""The schedules at their corners, and what holds for all of them at every step."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_ext.config import OptimConfig
from megatron_ext.learning_rate import learning_rate

LR, MIN_LR = 1e-3, 1e-4


def rates(optim: OptimConfig, num_steps: int, train_iters: int) -> list[float]:
    return [learning_rate(step, optim, train_iters=train_iters) for step in range(num_steps)]


def schedule(style: str, **fields: Any) -> OptimConfig:
    options: dict[str, Any] = {"lr": LR, "min_lr": MIN_LR, "lr_decay_style": style} | fields
    return OptimConfig(**options)


def test_warmup_rises_evenly_to_lr_and_starts_above_zero() -> None:
    for style in get_args(OptimConfig.model_fields["lr_decay_style"].annotation):
        found = rates(schedule(style, lr_warmup_iters=4), 5, 100)
        assert found == pytest.approx([LR * part / 5 for part in (1, 2, 3, 4, 5)], rel=1e-12)


def test_no_warmup_starts_at_lr() -> None:
    assert rates(schedule("cosine"), 1, 100) == [LR]


def test_constant_stays() -> None:
    assert rates(schedule("constant", lr_warmup_iters=3), 200, 100)[3:] == [LR] * 197


def test_cosine() -> None:
    found = rates(schedule("cosine", lr_warmup_iters=20), 130, 120)
    assert found[20] == LR
    # A quarter, half and three quarters of the way.
    assert found[45] == pytest.approx(MIN_LR + (LR - MIN_LR) * (1 + math.sqrt(0.5)) / 2)
    assert found[70] == pytest.approx((LR + MIN_LR) / 2)
    assert found[95] == pytest.approx(MIN_LR + (LR - MIN_LR) * (1 - math.sqrt(0.5)) / 2)
    assert found[120:] == pytest.approx([MIN_LR] * 10)


def test_linear_to_zero() -> None:
    found = rates(schedule("linear", min_lr=0.0, lr_warmup_iters=20), 121, 120)
    assert found[20:] == pytest.approx([LR * (100 - step) / 100 for step in range(101)])
    assert found[120] == 0.0


def test_decay_may_end_before_the_run() -> None:
    found = rates(schedule("linear", lr_decay_iters=50), 100, 100)
    assert found[25] == pytest.approx((LR + MIN_LR) / 2)
    assert found[50:] == pytest.approx([MIN_LR] * 50)


@pytest.mark.parametrize(
    ("style", "quarter", "half"),
    [
        ("linear", 0.75, 0.5),
        ("cosine", (1 + math.sqrt(0.5)) / 2, 0.5),
        ("minus_sqrt", 0.5, 1 - math.sqrt(0.5)),
        ("exponential", 2 * 0.5**0.25 - 1, math.sqrt(2) - 1),
    ],
)
def test_wsd_is_flat_and_then_falls(style: str, quarter: float, half: float) -> None:
    optim = schedule("wsd", lr_warmup_iters=10, lr_wsd_decay_iters=40, lr_wsd_decay_style=style)
    found = rates(optim, 105, 100)
    assert found[10:61] == [LR] * 51
    assert found[70] == pytest.approx(MIN_LR + (LR - MIN_LR) * quarter)
    assert found[80] == pytest.approx(MIN_LR + (LR - MIN_LR) * half)
    assert MIN_LR < found[99] < found[98]
    assert found[100:] == pytest.approx([MIN_LR] * 5)


def test_wsd_decays_over_a_tenth_by_default() -> None:
    found = rates(schedule("wsd"), 101, 100)
    assert found[90] == LR
    assert found[91] == pytest.approx(MIN_LR + (LR - MIN_LR) * (1 - math.sqrt(0.1)))
    assert found[100] == MIN_LR


def test_infinite_cools_down_stays_and_anneals() -> None:
    optim = schedule(
        "infinite",
        lr_warmup_iters=10,
        lr_cooldown_iters=20,
        constant_lr=5e-4,
        lr_wsd_decay_iters=10,
        lr_wsd_decay_style="linear",
    )
    found = rates(optim, 101, 100)
    assert found[10] == LR
    assert found[20] == pytest.approx((LR + 5e-4) / 2)
    assert found[30:91] == pytest.approx([5e-4] * 61)
    assert found[95] == pytest.approx((5e-4 + MIN_LR) / 2)
    assert found[100] == pytest.approx(MIN_LR)


def test_infinite_defaults_to_half_the_rate_and_tenths_of_the_steps() -> None:
    found = rates(schedule("infinite"), 101, 100)
    assert found[5] == pytest.approx(0.75 * LR)
    assert found[10:91] == pytest.approx([LR / 2] * 81)
    assert found[100] == pytest.approx(MIN_LR)


def test_no_last_decay_ends_at_the_minimum_all_the_same() -> None:
    found = rates(schedule("wsd", lr_wsd_decay_iters=0), 102, 100)
    assert found[99:] == [LR, MIN_LR, MIN_LR]


@given(
    style=st.sampled_from(["constant", "cosine", "linear", "wsd", "infinite"]),
    last_style=st.sampled_from(["linear", "cosine", "exponential", "minus_sqrt"]),
    warmup=st.integers(0, 60),
    cooldown=st.integers(1, 60),
    last=st.integers(1, 60),
    end=st.integers(1, 200),
    lr=st.floats(1e-8, 10.0),
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_every_rate_is_in_range_and_no_step_jumps(
    style: str,
    last_style: str,
    warmup: int,
    cooldown: int,
    last: int,
    end: int,
    lr: float,
    fractions: tuple[float, float],
) -> None:
    assume(warmup < end)
    assume(style not in ("wsd", "infinite") or warmup + last + cooldown <= end)
    optim = OptimConfig(
        lr=lr,
        min_lr=lr * min(fractions),
        constant_lr=lr * max(fractions),
        lr_decay_style=style,  # type: ignore[arg-type]
        lr_warmup_iters=warmup,
        lr_cooldown_iters=cooldown,
        lr_decay_iters=end,
        lr_wsd_decay_iters=last,
        lr_wsd_decay_style=last_style,  # type: ignore[arg-type]
    )
    found = rates(optim, end + 5, 10)
    ulp = 1e-12 * lr
    assert all(0.0 <= rate <= lr + ulp for rate in found)
    assert all(rate >= optim.min_lr - ulp for rate in found[warmup:])
    # The steepest that a part of n steps can be: half a cosine pi / 2n, 1 - sqrt sqrt(1 / n) at
    # its start, 2 (1 - 0.5^(1 / n)) < 2 ln 2 / n; a line 1 / n.
    steepest = max(
        1 / (warmup + 1),
        math.pi / 2 / (end - warmup) if style in ("cosine", "linear") else 0.0,
        math.pi / 2 / cooldown if style == "infinite" else 0.0,
        max(math.pi / 2 / last, math.sqrt(1 / last)) if style in ("wsd", "infinite") else 0.0,
    )
    for step, (before, after) in enumerate(itertools.pairwise(found)):
        assert abs(after - before) <= lr * steepest + ulp, f"from step {step}"
        if step >= warmup:
            assert after <= before + ulp, "after warm-up it never rises"
