"""The one door to NVIDIA's Transformer Engine; nothing else imports it.

`precision.backend=transformer_engine` multiplies a linear layer by its kernels, in the recipe of
its own that bears our name. Weights, their names in checkpoints and what tensor-parallel ranks
exchange stay as they are: only the three products are the library's. It scales by the magnitudes of
the moment, so it has no state either; its random numbers are its own, though.

Written after the library's documentation (transformer_engine.pytorch.Linear, fp8_autocast, the
classes of transformer_engine.common.recipe).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.precision.main_grad import float32_main_grad
from parallel.optional_library import Availability, import_library

_RECIPES = {
    "fp8_tensorwise": "Float8CurrentScaling",
    "fp8_blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
    "nvfp4": "NVFP4BlockScaling",
}
# Tokens that all its recipes can contract.
_TOKEN_GROUP = 32


@cache
def has_transformer_engine() -> Availability:
    """Import Transformer Engine once and say what came of it."""
    found = import_library(
        "transformer_engine.pytorch",
        "Transformer Engine",
        how="pip install transformer_engine[pytorch]",
        needs="Linear",
    )
    if found and not torch.cuda.is_available():
        return Availability(False, "Transformer Engine needs a GPU, and torch sees none")
    return found


class TransformerEngineLinear:
    """What `LayerPrecision` is to the project's own kernels."""

    def __init__(self, weight: Tensor, recipe_name: str) -> None:
        """weight: the layer's parameter, [out_size, in_size], which is shared.

        Raises:
            UserError: Transformer Engine is not there, or has no such recipe.
        """
        if not (availability := has_transformer_engine()):
            raise UserError(
                f"precision.backend=transformer_engine: {availability.reason}; with "
                "precision.backend=auto the project's own kernels serve"
            )
        from transformer_engine.common import recipe
        from transformer_engine.pytorch import Linear

        if not hasattr(recipe, _RECIPES[recipe_name]):
            raise UserError(
                f"precision.recipe={recipe_name}: this version of Transformer Engine "
                f"({availability.reason}) has no {_RECIPES[recipe_name]}; install a newer one, or "
                "set precision.backend=auto"
            )
        self._recipe: Any = getattr(recipe, _RECIPES[recipe_name])()
        out_size, in_size = weight.shape
        # Without a weight of its own; nor is it part of the model, so nothing is saved twice.
        self._module: Any = Linear(
            in_size, out_size, bias=False, params_dtype=weight.dtype, device="meta"
        )
        self._module.weight = weight

    def linear(self, rows: Tensor, weight: Tensor) -> Tensor:
        """rows [..., in_size] -> [..., out_size]; weight: the one that this was made with."""
        from transformer_engine.pytorch import fp8_autocast

        assert weight is self._module.weight
        self._module.fuse_wgrad_accumulation = float32_main_grad(weight) is not None
        flat = rows.reshape(-1, rows.shape[-1])
        num_tokens = len(flat)
        filled = F.pad(flat, (0, 0, 0, -num_tokens % _TOKEN_GROUP))
        with fp8_autocast(enabled=True, fp8_recipe=self._recipe):
            result: Tensor = self._module(filled)
        return result[:num_tokens].view(*rows.shape[:-1], -1)
