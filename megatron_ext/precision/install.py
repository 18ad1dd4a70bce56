"""Gives the layers of a run their recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.moe_layer import MoEMLP
from megatron_ext.precision.chosen_recipe import kept_layers
from megatron_ext.precision.experts import LowPrecisionExperts
from megatron_ext.precision.layer_precision import LayerPrecision
from megatron_ext.precision.linear_operands import Shares
from megatron_ext.precision.linear_recipe import LinearRecipe
from megatron_ext.precision.parallel_linear import (
    PrecisionColumnParallelLinear,
    PrecisionRowParallelLinear,
)
from megatron_ext.precision.transformer_engine_door import TransformerEngineLinear
from moe.schedule.serial import SerialExperts


class LowPrecision:
    """The linear layers of this rank that compute in few bits.

    Random numbers follow from the run's seed, the step, the layer, how many passes it has made in
    this step, and the rank: nothing has to be kept in a checkpoint for a resumed run to draw the
    same ones.
    """

    def __init__(self, layers: Sequence[LayerPrecision]) -> None:
        self._layers = layers

    def begin_step(self, step: int) -> None:
        for layer in self._layers:
            layer.step, layer.num_passes = step, 0


def install_low_precision(
    chunks: Sequence[nn.Module], config: Config, recipe: LinearRecipe, *, rank: int
) -> LowPrecision | None:
    """Give every linear of the transformer layers that are not kept its recipe.

    Args:
        rank: tells ranks apart whose rounding should differ.

    Raises:
        UserError: a layer's features are no multiple of the recipe's groups, or the library that
            was named is not there.
    """
    if not any(recipe.operands().values()):
        return None
    layers: list[LayerPrecision] = []
    kept = kept_layers(config, recipe)
    plain = LayerPrecision(recipe, run_seed=config.train.seed, number=0, rank=rank, shares=None)
    for name, layer in _layers(chunks):
        if layer.layer_number - 1 in kept:
            continue
        first = layer.layer_number * _NUMBERS_PER_LAYER
        for place, (linear_name, linear) in enumerate(_linears(name, layer)):
            _check_sizes(linear_name, linear.weight, recipe)
            if recipe.backend == "transformer_engine":
                linear.low_precision = TransformerEngineLinear(linear.weight, recipe.name)
                continue
            layers.append(precision_of(linear, replace(plain, number=first + place)))
            linear.low_precision = layers[-1]
        if isinstance(layer.mlp, MoEMLP):
            layers += _install_experts(layer.mlp, plain, first, name=f"{name}.mlp.experts")
    return LowPrecision(layers)


# More than a layer has linear maps.
_NUMBERS_PER_LAYER = 1 << 16


def _layers(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if hasattr(module, "layer_number") and hasattr(module, "self_attention"):
                yield name, module


def _linears(name: str, layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear maps of a layer that are not experts."""
    for linear_name, module in layer.named_modules(prefix=name):
        if isinstance(module, PrecisionColumnParallelLinear | PrecisionRowParallelLinear):
            yield linear_name, module


def _install_experts(
    mlp: MoEMLP, plain: LayerPrecision, first: int, *, name: str
) -> list[LayerPrecision]:
    weights = mlp.experts.linear_fc1, mlp.experts.linear_fc2
    for weight, linear_name in zip(weights, ("linear_fc1", "linear_fc2"), strict=True):
        _check_sizes(f"{name}.{linear_name}", weight[0], plain.recipe)
    made = [replace(plain, number=first + number) for number in (_FC1_OF_EXPERTS, _FC2_OF_EXPERTS)]
    run_experts = LowPrecisionExperts(*made)
    mlp.exact = SerialExperts(mlp.dispatcher, run_experts=run_experts)
    return made


# Beyond those of a layer's other linear maps.
_FC1_OF_EXPERTS, _FC2_OF_EXPERTS = 64, 65


def precision_of(linear: Any, plain: LayerPrecision) -> LayerPrecision:
    """With what tensor-parallel ranks agree on, and numbers of their own for what they do not."""
    group = linear.tp_group
    if group is None or group.size() == 1:
        return plain
    # Neighbouring ranks are tensor-parallel ones, so this is the rank there would be without them.
    rank = plain.rank // group.size()
    return replace(plain, rank=rank, part=group.rank(), shares=_shares(linear))


def _shares(linear: Any) -> Shares:
    group = linear.tp_group

    def reduce_amax(amax: Tensor) -> Tensor:
        agreed = amax.detach().clone()
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
        return agreed

    is_column = isinstance(linear, PrecisionColumnParallelLinear)
    return Shares("out" if is_column else "in", reduce_amax)


def _check_sizes(name: str, weight: Tensor, recipe: LinearRecipe) -> None:
    """Blocks and Hadamard groups divide the features of this rank."""
    out_size, in_size = weight.shape
    for operand, quantizer in recipe.operands().items():
        size = in_size if operand.startswith("forward") else out_size
        if quantizer is None or operand.startswith("wgrad"):
            continue
        is_packed = quantizer.block_format.is_packed
        group = quantizer.group if is_packed else quantizer.hadamard_group
        if size % group:
            raise UserError(
                f"{name}: {operand} of precision.recipe={recipe.name} needs groups of {group} "
                f"along a dim of {size} (weight on this rank: {out_size} x {in_size}); "
                "choose sizes or a tensor_model_parallel_size so that the group divides, or keep "
                "the layer with precision.keep_layers"
            )
