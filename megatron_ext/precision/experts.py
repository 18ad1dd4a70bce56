"""A rank's experts with products of few bits, one expert after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.precision.layer_precision import LayerPrecision
from moe.swiglu import swiglu


class LowPrecisionExperts:
    """Stands for `moe.experts.run_experts` where a recipe is chosen.

    Blocks never reach over two experts: each is a linear layer of its own, its tokens filled up to
    whole groups in wgrad. With one scale for the tensor each expert has its own.
    """

    def __init__(self, first: Sequence[LayerPrecision], second: Sequence[LayerPrecision]) -> None:
        """first, second: of linear_fc1 and linear_fc2 of each expert of this rank."""
        self._linears = list(zip(first, second, strict=True))

    def __call__(
        self, rows: Tensor, counts: Tensor, linear_fc1: Tensor, linear_fc2: Tensor
    ) -> Tensor:
        """As `run_experts`: rows [num_rows, hidden_size], those of the first expert first."""
        outputs = [rows.new_empty(0, linear_fc2.shape[1])]
        parts = torch.split(rows, counts.tolist())
        # An expert without rows gets gradient 0: unbinding fills in what nothing was made of.
        weights = zip(linear_fc1.unbind(), linear_fc2.unbind(), strict=True)
        for part, (fc1, fc2), (first, second) in zip(parts, weights, self._linears, strict=True):
            if len(part):
                outputs.append(second.linear(swiglu(first.linear(part, fc1)), fc2))
        if len(outputs) == 1:
            # Part of the graph all the same: other ranks' backward passes wait for this one.
            return rows * (linear_fc1.sum() + linear_fc2.sum())
        return torch.cat(outputs)
