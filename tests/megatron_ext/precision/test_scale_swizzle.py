"""The order of Blackwell's scales: byte by byte as documented, and back."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.precision.scale_swizzle import swizzled_scales, unswizzled_scales


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (131, 7), (300, 13)])
def test_every_scale_stands_where_the_documentation_says(shape: tuple[int, int]) -> None:
    rows, columns = shape
    scales = torch.randint(1, 256, shape, dtype=torch.uint8)
    swizzled = swizzled_scales(scales)
    assert swizzled.shape == (-(-rows // 128), -(-columns // 4), 512)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    within = 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4
    assert torch.equal(swizzled[row // 128, column // 4, within], scales)
    # What was filled up is 0.
    assert int(swizzled.count_nonzero()) == scales.numel()


def test_experts_are_swizzled_each_on_its_own_and_back() -> None:
    scales = torch.randint(0, 256, (3, 130, 6), dtype=torch.uint8)
    swizzled = swizzled_scales(scales)
    for one, expert in zip(swizzled, scales, strict=True):
        assert torch.equal(one, swizzled_scales(expert))
    assert torch.equal(unswizzled_scales(swizzled, 130, 6), scales)
