"""The recipe that a configuration chose, and the layers that it leaves out. No torch in here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from megatron_ext.config import Config
from megatron_ext.precision.linear_recipe import (
    LinearRecipe,
    check_recipe,
    linear_recipes,
    override,
)
from megatron_ext.precision.luq import luq_recipe


def chosen_recipe(config: Config) -> LinearRecipe:
    """With the configuration's changes. ValueError: a change makes no sense."""
    name = config.precision.recipe
    recipe = luq_recipe() if name == "luq" else linear_recipes()[name]
    recipe = replace(recipe, backend=config.precision.backend)
    if config.precision.backward_reads is not None:
        recipe = replace(recipe, backward_reads=config.precision.backward_reads)
    recipe = override(recipe, config.precision.operands)
    check_recipe(recipe)
    return recipe


def recipe_digest(config: Config) -> str:
    """What a run computes in, as one word: name of the recipe and a digest of all it consists of.

    Who computes (`backend`) is not in it, for the bits are the same; but for Transformer Engine's.
    """
    recipe = chosen_recipe(config)
    content: dict[str, Any] = {
        name: None if quantizer is None else asdict(quantizer)
        for name, quantizer in recipe.operands().items()
    }
    if any(content.values()):
        content["backward_reads"] = recipe.backward_reads
        content["kept"] = sorted(kept_layers(config, recipe))
        content["is_own"] = recipe.backend != "transformer_engine"
    text = json.dumps(content, sort_keys=True)
    return f"{recipe.name}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def kept_layers(config: Config, recipe: LinearRecipe) -> frozenset[int]:
    """Transformer layers, from 0, whose products stay in the run's dtype."""
    num_layers = config.model.num_layers
    if config.precision.keep_layers is not None:
        return frozenset(config.precision.keep_layers)
    share = config.precision.keep_last_share
    share = recipe.keep_last_share if share is None else share
    return frozenset(range(num_layers - math.ceil(share * num_layers), num_layers))


def recipe_rules(config: Config) -> Iterator[str]:
    """What is wrong with the section `precision`."""
    try:
        chosen_recipe(config)
    except ValueError as error:
        yield f"precision.operands and precision.recipe={config.precision.recipe}: {error}"
    if config.precision.recipe != "bf16" and config.moe.num_moe_experts is not None:
        moe = config.moe
        if moe.moe_num_chunks != 1 or moe.moe_num_backward_chunks not in (None, 1):
            yield (
                f"precision.recipe={config.precision.recipe}: experts in chunks multiply in the "
                "run's dtype only; set moe.moe_num_chunks=1"
            )
        if moe.moe_lsh_num_hashes:
            yield (
                f"precision.recipe={config.precision.recipe}: compressed dispatch runs experts in "
                "the run's dtype only; leave moe.moe_lsh_num_hashes out"
            )
    if config.precision.recipe == "luq" and config.parallel.tensor_model_parallel_size > 1:
        yield (
            "precision.recipe=luq clips by moments of whole tensors, which tensor-parallel ranks "
            "have parts of; set parallel.tensor_model_parallel_size=1"
        )
    if config.precision.backend == "transformer_engine":
        yield from _transformer_engine_rules(config)
    kept = config.precision.keep_layers
    if kept is not None:
        if config.precision.keep_last_share is not None:
            yield "precision.keep_layers and precision.keep_last_share exclude each other; set one"
        wrong = [layer for layer in kept if not 0 <= layer < config.model.num_layers]
        if wrong:
            yield (
                f"precision.keep_layers: {wrong[0]} is no layer; there are 0 to "
                f"{config.model.num_layers - 1}"
            )


# The names of `transformer_engine_door.py`, which imports torch.
_OF_TRANSFORMER_ENGINE = ("fp8_tensorwise", "fp8_blockwise", "mxfp8", "nvfp4")


def _transformer_engine_rules(config: Config) -> Iterator[str]:
    """What `precision.backend=transformer_engine` leaves to choose."""
    precision = config.precision
    if precision.recipe not in _OF_TRANSFORMER_ENGINE:
        yield (
            f"precision.backend=transformer_engine has no recipe {precision.recipe}; use "
            f"{', '.join(_OF_TRANSFORMER_ENGINE)}, or precision.backend=auto"
        )
    if precision.operands or precision.backward_reads is not None:
        yield (
            "precision.backend=transformer_engine has recipes of its own: leave precision.operands "
            "and precision.backward_reads out, or set precision.backend=auto"
        )
    if config.moe.num_moe_experts is not None:
        yield (
            "precision.backend=transformer_engine multiplies no experts; set precision.backend=auto"
        )
