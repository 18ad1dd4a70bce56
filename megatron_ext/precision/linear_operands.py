"""The six operands of a linear layer: who stores them how, with which random numbers.

Seeds follow from the run, the pass and, for what is rounded at random, the rank; the largest
magnitude of a tensor that ranks have parts of is agreed on. Tokens are contracted by wgrad: both
its operands are filled up with zeros to whole groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.gemm import multiply
from megatron_ext.precision.linear_recipe import BackendName, LinearRecipe
from megatron_ext.precision.quantize import quantize, quantize_both
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import derive_seed, random_signs
from megatron_ext.precision.reference import ReduceAmax

Matrix = Literal["rows", "weight", "grad"]
MATRICES: tuple[Matrix, ...] = ("rows", "weight", "grad")
FORWARD, DGRAD, WGRAD = range(3)


@dataclass(frozen=True, slots=True)
class LinearSeeds:
    """Where the random numbers of one pass through one layer come from.

    Attributes:
        run: fixed sign vectors follow from it, the same in all layers and steps.
        each_pass: rounding and fresh signs follow from it, the same on all ranks.
        rank: tells ranks apart that have other tokens; only rounding differs.
        part: tells tensor-parallel ranks apart, where they round parts of a matrix. What each of
            them has whole it rounds as the others do, and as one rank alone.
    """

    run: int
    each_pass: int
    rank: int = 0
    part: int = 0

    def signs(self, quantizer: Quantizer | None, product: int) -> Tensor | None:
        """Both operands of a product have the same."""
        if quantizer is None or quantizer.signs == "none" or quantizer.hadamard_group == 1:
            return None
        base = self.run if quantizer.signs == "fixed" else self.each_pass
        return random_signs(derive_seed(base, product, 7), quantizer.hadamard_group)

    def rounding(self, product: int, operand: int, *, is_part: bool = False) -> int:
        seed = derive_seed(self.each_pass, self.rank, product, operand)
        return derive_seed(seed, self.part) if is_part and self.part else seed


@dataclass(frozen=True, slots=True)
class Shares:
    """Which of the three matrices are one rank's part of a larger one, and how amax is agreed on.

    Attributes:
        split: the features that are spread over ranks: "out" (column-parallel: weight and the
            gradient are parts) or "in" (row-parallel: weight and the input).
        reduce_amax: the maximum over those ranks.
    """

    split: Literal["out", "in"]
    reduce_amax: ReduceAmax

    def of(self, matrix: Matrix) -> ReduceAmax | None:
        is_whole = matrix == ("rows" if self.split == "out" else "grad")
        return None if is_whole else self.reduce_amax


@dataclass(frozen=True, slots=True)
class LinearStore:
    """Quantises the operands of one pass, and multiplies them."""

    seeds: LinearSeeds
    shares: Shares | None
    recipe: LinearRecipe

    @property
    def backend(self) -> BackendName:
        return self.recipe.backend

    @property
    def token_group(self) -> int:
        """What wgrad's operands have a multiple of tokens of."""
        return token_group(self.recipe)

    def __call__(
        self, matrix: Tensor, quantizer: Quantizer | None, name: Matrix, product: int
    ) -> Quantized | Tensor:
        if quantizer is None:
            return matrix
        request = self._request(quantizer, name, product)
        return quantize(
            matrix,
            quantizer,
            seed=request.seed,
            signs=request.signs,
            reduce_amax=self._reduce_amax(name),
            backend=self.backend,
        )

    def both(
        self,
        rows: Tensor,
        first: tuple[Quantizer | None, int],
        of_wgrad: Quantizer | None,
        name: Matrix,
    ) -> tuple[Quantized | Tensor, Quantized | Tensor]:
        """An operand of forward or dgrad (quantizer, product), and that of wgrad, in one pass."""
        quantizer, product = first
        if quantizer is None or of_wgrad is None:
            copy = self(rows, quantizer, name, product)
            return copy, self.tokens_last(rows, of_wgrad, name)
        num_tokens = len(rows) + -len(rows) % self.token_group
        return quantize_both(
            rows,
            self._request(quantizer, name, product),
            self._request(of_wgrad, name, WGRAD),
            reduce_amax=self._reduce_amax(name),
            num_columns=num_tokens,
            backend=self.backend,
        )

    def tokens_last(
        self, rows: Tensor, quantizer: Quantizer | None, name: Matrix
    ) -> Quantized | Tensor:
        """An operand of wgrad: [features, tokens], tokens filled up to whole groups."""
        missing = -len(rows) % self.token_group
        return self(F.pad(rows.t(), (0, missing)), quantizer, name, WGRAD)

    def multiply(
        self,
        left: Quantized | Tensor,
        right: Quantized | Tensor,
        *,
        out_dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        return multiply(left, right, out_dtype=out_dtype, out=out, backend=self.backend)

    def _request(self, quantizer: Quantizer, name: Matrix, product: int) -> CopyRequest:
        is_part = self._reduce_amax(name) is not None
        seed = self.seeds.rounding(product, MATRICES.index(name), is_part=is_part)
        return CopyRequest(quantizer, seed, self.seeds.signs(quantizer, product))

    def _reduce_amax(self, name: Matrix) -> ReduceAmax | None:
        return None if self.shares is None else self.shares.of(name)


def token_group(recipe: LinearRecipe) -> int:
    """Tokens that whole groups of both operands of wgrad have: a common multiple."""
    both = recipe.wgrad_grad, recipe.wgrad_input
    return math.lcm(*(1 if quantizer is None else quantizer.group for quantizer in both))
