"""What must hold between the fields that say how tokens travel to their experts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config import Config


def layout_problem(expert_size: int, ranks_per_node: int) -> str:
    """Why groups of so many consecutive ranks do not lie on nodes evenly; empty where they do."""
    if expert_size % ranks_per_node == 0 or ranks_per_node % expert_size == 0:
        return ""
    return (
        f"groups of parallel.expert_model_parallel_size={expert_size} ranks do not fill nodes of "
        f"{ranks_per_node} ranks; one must divide the other"
    )


def dispatcher_rules(config: Config) -> Iterator[str]:
    """What is wrong with the choice."""
    kind, expert_size = (
        config.moe.moe_token_dispatcher_type,
        config.parallel.expert_model_parallel_size,
    )
    if expert_size == 1 and kind in ("hierarchical", "deep_ep"):
        yield (
            f"moe.moe_token_dispatcher_type={kind} needs ranks that share experts; set "
            "parallel.expert_model_parallel_size to 2 or more, or the type to auto"
        )
    yield from _chunk_rules(config)
    ranks_per_node = config.parallel.ranks_per_node or 1
    if kind == "hierarchical" and (problem := layout_problem(expert_size, ranks_per_node)):
        yield f"parallel.ranks_per_node={ranks_per_node}: {problem}"


def _chunk_rules(config: Config) -> Iterator[str]:
    moe = config.moe
    names = [
        name
        for name in ("moe_num_chunks", "moe_num_backward_chunks")
        if getattr(moe, name) not in (None, 1)
    ]
    if not names:
        return
    wanted = f"moe.{names[0]}={getattr(moe, names[0])}"
    if config.parallel.expert_model_parallel_size == 1 and getattr(moe, names[0]) != "auto":
        yield (
            f"{wanted} cuts what travels between ranks that share experts, of which there are "
            "none; set parallel.expert_model_parallel_size to 2 or more, or leave it out"
        )
    if moe.moe_token_dispatcher_type == "deep_ep":
        yield (
            f"{wanted}: deep_ep sends a micro-batch at once; use "
            "moe.moe_token_dispatcher_type=auto, exact or hierarchical"
        )
    num_layers_with_experts = sum(map(bool, config.moe_layers))
    if config.lsh_layers and len(config.lsh_layers) == num_layers_with_experts:
        yield (
            f"{wanted} does nothing where moe.moe_lsh_num_hashes compresses every layer; leave "
            "one of them out, or name fewer moe.moe_lsh_layers"
        )
