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
    yield from _gap_rules(config)
    ranks_per_node = config.parallel.ranks_per_node or 1
    if kind == "hierarchical" and (problem := layout_problem(expert_size, ranks_per_node)):
        yield f"parallel.ranks_per_node={ranks_per_node}: {problem}"


def _gap_rules(config: Config) -> Iterator[str]:
    parallel, moe = config.parallel, config.moe
    if not parallel.grad_reduce_in_gaps:
        return
    if not parallel.overlap_grad_reduce:
        yield "parallel.grad_reduce_in_gaps=true needs parallel.overlap_grad_reduce=true"
    if (moe.moe_num_backward_chunks or moe.moe_num_chunks) == 1:
        yield (
            "parallel.grad_reduce_in_gaps=true: there are gaps where tokens travel in chunks; set "
            "moe.moe_num_chunks, e.g. to auto"
        )
    if parallel.virtual_pipeline_model_parallel_size is not None:
        yield (
            "parallel.grad_reduce_in_gaps=true: interleaved stages reduce a chunk at once; leave "
            "parallel.virtual_pipeline_model_parallel_size out"
        )


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
