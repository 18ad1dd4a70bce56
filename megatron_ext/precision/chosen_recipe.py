"""The recipe that a configuration chose, and the layers that it leaves out. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_ext.config import Config
from megatron_ext.precision.linear_recipe import LinearRecipe, linear_recipes, override
from megatron_ext.precision.luq import luq_recipe


def chosen_recipe(config: Config) -> LinearRecipe:
    """With the configuration's changes. ValueError: a change makes no sense."""
    name = config.precision.recipe
    recipe = luq_recipe() if name == "luq" else linear_recipes()[name]
    recipe = replace(recipe, backend=config.precision.backend)
    return override(recipe, config.precision.operands)


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
        yield f"precision.operands: {error}"
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
