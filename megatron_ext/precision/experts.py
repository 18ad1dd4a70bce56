"""A rank's experts with grouped products of few bits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_ext.precision.grouped_linear import grouped_linear
from megatron_ext.precision.layer_precision import LayerPrecision
from moe.swiglu import swiglu


@dataclass(frozen=True, slots=True)
class LowPrecisionExperts:
    """Stands for `moe.experts.run_experts` where a recipe is chosen.

    Blocks never reach over two experts, whose tokens are filled up to whole groups in wgrad. With
    one scale for the tensor each expert has its own.

    Attributes:
        first, second: linear_fc1 and linear_fc2 of all experts.
    """

    first: LayerPrecision
    second: LayerPrecision

    def __call__(
        self, rows: Tensor, counts: Tensor, linear_fc1: Tensor, linear_fc2: Tensor
    ) -> Tensor:
        """As `run_experts`: rows [num_rows, hidden_size], those of the first expert first."""
        seeds = self.first.next_seeds(), self.second.next_seeds()
        if not len(rows):
            # Part of the graph all the same: other ranks' backward passes wait for this one.
            return rows * (linear_fc1.sum() + linear_fc2.sum())
        of_expert = tuple(counts.tolist())
        recipe = self.first.recipe
        gate_up = grouped_linear(rows, linear_fc1, recipe, seeds[0], of_expert)
        return grouped_linear(swiglu(gate_up), linear_fc2, recipe, seeds[1], of_expert)
