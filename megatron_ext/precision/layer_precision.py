"""What one linear layer of a run needs to multiply few bits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_ext.precision.linear import LinearSeeds, Shares, low_precision_linear
from megatron_ext.precision.linear_recipe import LinearRecipe
from megatron_ext.precision.random_bits import derive_seed


@dataclass
class LayerPrecision:
    """What one linear layer needs to compute in few bits; `num_passes` counts within a step."""

    recipe: LinearRecipe
    run_seed: int
    number: int
    rank: int
    shares: Shares | None
    step: int = 0
    num_passes: int = 0

    def linear(self, rows: Tensor, weight: Tensor) -> Tensor:
        """rows [..., in_size] -> [..., out_size]."""
        self.num_passes += 1
        seeds = LinearSeeds(
            run=self.run_seed,
            each_pass=derive_seed(self.run_seed, self.step, self.number, self.num_passes),
            rank=self.rank,
        )
        flat = rows.reshape(-1, rows.shape[-1])
        result = low_precision_linear(flat, weight, self.recipe, seeds, shares=self.shares)
        return result.view(*rows.shape[:-1], -1)
