"""What must hold between the fields that say how tokens are compressed on their way to experts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config import Config
from megatron_ext.moe_config import MoEConfig
from moe.lsh.buckets import num_buckets


def compression_rules(config: Config) -> Iterator[str]:
    """Each broken rule, with what would work; experts are there."""
    moe = config.moe
    if moe.moe_lsh_num_hashes is None:
        for name, default in MoEConfig():
            if name.startswith("moe_lsh_") and getattr(moe, name) != default:
                yield f"moe.{name} does nothing without moe.moe_lsh_num_hashes; try 6"
        return
    if moe.moe_lsh_hash_dim > config.model.hidden_size:
        yield (
            f"moe.moe_lsh_hash_dim={moe.moe_lsh_hash_dim} is more than model.hidden_size="
            f"{config.model.hidden_size}; use few directions, e.g. 4"
        )
    try:
        num_buckets(moe.moe_lsh_num_hashes, moe.moe_lsh_hash_dim)
    except ValueError as error:
        yield f"moe.moe_lsh_num_hashes, moe.moe_lsh_hash_dim: {error}"
    if moe.moe_lsh_payload_gradients and moe.moe_lsh_payload == "none":
        yield "moe.moe_lsh_payload_gradients=true needs moe.moe_lsh_payload, e.g. int8"
    if moe.moe_lsh_num_refinements and moe.moe_lsh_centroid == "first":
        yield (
            f"moe.moe_lsh_num_refinements={moe.moe_lsh_num_refinements} moves tokens to means; use "
            "moe.moe_lsh_centroid=mean"
        )
    possible = [layer for layer, has_experts in enumerate(config.moe_layers) if has_experts]
    without = sorted(set(moe.moe_lsh_layers or []) - set(possible))
    if without:
        yield f"moe.moe_lsh_layers names layers without experts: {without}; there are {possible}"
    if moe.moe_lsh_layers == []:
        yield "moe.moe_lsh_layers=[] compresses nothing; leave moe.moe_lsh_num_hashes out"
