"""What one linear layer of a run needs to multiply few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_ext.precision.linear import low_precision_linear
from megatron_ext.precision.linear_operands import LinearSeeds, Shares
from megatron_ext.precision.linear_recipe import LinearRecipe
from megatron_ext.precision.random_bits import derive_seed


class FewBitLinear(Protocol):
    """Who multiplies for a linear layer: the project's own, or a library."""

    def linear(self, rows: Tensor, weight: Tensor) -> Tensor:
        """rows [..., in_size] -> [..., out_size]; weight [out_size, in_size]."""
        ...


@dataclass
class LayerPrecision:
    """What one linear layer needs to compute in few bits; `num_passes` counts within a step."""

    recipe: LinearRecipe
    run_seed: int
    number: int
    rank: int
    shares: Shares | None
    part: int = 0
    step: int = 0
    num_passes: int = 0

    def next_seeds(self) -> LinearSeeds:
        """Of another pass."""
        self.num_passes += 1
        return LinearSeeds(
            run=self.run_seed,
            each_pass=derive_seed(self.run_seed, self.step, self.number, self.num_passes),
            rank=self.rank,
            part=self.part,
        )

    def linear(self, rows: Tensor, weight: Tensor) -> Tensor:
        """rows [..., in_size] -> [..., out_size]."""
        flat = rows.reshape(-1, rows.shape[-1])
        seeds = self.next_seeds()
        result = low_precision_linear(flat, weight, self.recipe, seeds, shares=self.shares)
        return result.view(*rows.shape[:-1], -1)
