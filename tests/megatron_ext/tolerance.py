"""How far from the exact answer a computation in low precision may be.

The yardstick is the error that the same precision makes without any cleverness: the answer in
float64, and again step by step in the inputs' own precision. What is tested may be off by twice
the plain error and one unit in the last place of the largest number on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good_as_plain(
    found: Tensor, *, plain: Tensor, exact: Tensor, what: str, largest: float = 0.0
) -> None:
    """max|found - exact| <= 2 max|plain - exact| + one unit in the last place of `largest`.

    Args:
        found: what is tested; its dtype decides the unit.
        plain: the same in plain low precision.
        exact: the same in float64.
        what: the case, for the message.
        largest: largest number that is rounded on the way, where the answer is smaller.
    """
    assert found.shape == exact.shape, what
    if not exact.numel():
        return
    plain_error = float((plain.double() - exact).abs().max())
    largest = max(largest, float(exact.abs().max()))
    allowed = 2 * plain_error + torch.finfo(found.dtype).eps * largest
    error = float((found.double() - exact).abs().max())
    assert error <= allowed, f"{what}: off by {error:.3e}, allowed {allowed:.3e}"
