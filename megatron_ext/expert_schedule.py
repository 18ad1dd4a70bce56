"""Expert layers whose tokens travel in chunks while others are computed (FSMoE).

Numbers of chunks come from the configuration, or from a measurement at the start of a run that all
ranks of an expert-parallel group make together and agree on: of this network's legs and of the
experts of the first such layer. All layers have the same shape, so one choice serves them all, and
one those that compress: how much they will send is not known yet, so a quarter is taken for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megatron_ext.config import Config
from megatron_ext.expert_compression import ExpertCompression
from megatron_ext.gradient_gaps import (
    GapRoom,
    HeldGradients,
    gradient_element_bytes,
    reduction_cost,
)
from megatron_ext.model import unwrap
from megatron_ext.moe_layer import MoEMLP
from moe.dispatch.exact import ExactDispatcher
from moe.dispatch.hierarchical import HierarchicalDispatcher
from moe.dispatch.payload import row_bytes
from moe.schedule.choose import Chunking
from moe.schedule.choose_layer import LayerLoad, choose_for
from moe.schedule.chunked import ChunkedExperts, streams_of
from moe.schedule.lanes import lanes_for
from moe.schedule.linear_cost import LinearCost
from moe.schedule.profile import LayerProfile, LegProfile, measure_experts, measure_leg

# Rows that travel for each choice where similar tokens travel as one: what it is meant to be.
_EXPECTED_RATE = 0.25


def schedule_experts(
    chunks: Sequence[nn.Module],
    config: Config,
    *,
    compression: ExpertCompression | None,
    say: Callable[[str], None],
) -> HeldGradients | None:
    """Give the layers of this rank's chunks their schedule; every rank calls this together.

    Returns:
        What holds gradients back for the layers' gaps, where it was asked for.
    """
    moe = config.moe
    layers = [
        layer.mlp
        for chunk in chunks
        for layer in unwrap(chunk).decoder.layers
        if isinstance(layer.mlp, MoEMLP)
    ]
    if moe.moe_num_chunks == 1 and moe.moe_num_backward_chunks in (None, 1):
        return None
    scheduled = [
        layer
        for layer in layers
        if isinstance(layer.dispatcher, ExactDispatcher | HierarchicalDispatcher)
    ]
    if not scheduled:
        return None
    lanes = lanes_for(scheduled[0].experts.linear_fc1.device)
    is_measured = "auto" in (moe.moe_num_chunks, moe.moe_num_backward_chunks)
    wants_gaps = config.parallel.grad_reduce_in_gaps
    profile = _profile(config, scheduled[0]) if is_measured or wants_gaps else None
    load = _load(config, scheduled[0])
    forward, backward = _passes(config, load, profile)
    say(f"experts travel in {forward.num_chunks} chunks, backward in {backward.num_chunks}")
    gaps = None
    if wants_gaps:
        assert profile is not None
        room = _room(config, profile, load, backward)
        element_bytes = gradient_element_bytes(config, scheduled[0].experts.linear_fc1)
        fitting = room.bucket_size(element_bytes=element_bytes)
        say(
            f"a gap for gradients is {1e3 * room.seconds:.1f} ms long"
            + (f", for ddp_bucket_size={fitting}" if fitting else ": no bucket fits")
        )
        gaps = HeldGradients(room)
    for layer in scheduled:
        assert isinstance(layer.dispatcher, ExactDispatcher | HierarchicalDispatcher)
        layer.exact = ChunkedExperts(
            layer.dispatcher, lanes, forward=forward, backward=backward, gaps=gaps
        )
    if compression is not None:
        load = _load(config, scheduled[0], rate=_EXPECTED_RATE)
        forward, backward = _passes(config, load, profile)
        say(f"centroids travel in {forward.num_chunks} chunks, backward in {backward.num_chunks}")
        compression.cut_into_chunks(
            lambda dispatcher, hooks: ChunkedExperts(
                dispatcher,
                lanes,
                forward=forward,
                backward=backward,
                make_hooks=hooks,
                gaps=gaps,
            )
        )
    return gaps


def _room(config: Config, profile: LayerProfile, load: LayerLoad, backward: Chunking) -> GapRoom:
    """Of a backward pass; ranks that share gradients take the smallest of all."""
    _, cost = profile.passes(leg_bytes=load.leg_bytes, num_rows=load.num_rows)
    reduction = reduction_cost(
        profile.legs[0].cost,
        num_ranks=parallel_state.get_data_parallel_world_size(),
        is_scattered=config.parallel.use_distributed_optimizer,
    )
    found = torch.tensor(
        [cost.gap_seconds(backward), -reduction.fixed_seconds, -reduction.seconds_per_unit],
        dtype=torch.float64,
        device=torch.cuda.current_device(),
    )
    group = parallel_state.get_tensor_and_data_parallel_group()
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=group)
    seconds, fixed, per_byte = found.tolist()
    return GapRoom(seconds, LinearCost(-fixed, -per_byte))


def _passes(
    config: Config, load: LayerLoad, profile: LayerProfile | None
) -> tuple[Chunking, Chunking]:
    """As the configuration says, measured where it says auto."""
    forward = config.moe.moe_num_chunks
    backward = config.moe.moe_num_backward_chunks or forward
    if "auto" not in (forward, backward):
        return Chunking.of(int(forward)), Chunking.of(int(backward))
    assert profile is not None
    chosen = choose_for(profile, load)
    return (
        chosen[0] if forward == "auto" else Chunking.of(forward),
        chosen[1] if backward == "auto" else Chunking.of(backward),
    )


def _load(config: Config, layer: MoEMLP, *, rate: float | None = None) -> LayerLoad:
    """rate: see `LayerLoad`."""
    assert config.moe.num_moe_experts is not None
    weight, dispatcher = layer.experts.linear_fc1, layer.dispatcher
    payload = "none" if rate is None else config.moe.moe_lsh_payload
    nodes = dispatcher.channels[0] if isinstance(dispatcher, HierarchicalDispatcher) else None
    return LayerLoad(
        num_tokens=config.data.micro_batch_tokens // config.parallel.tensor_model_parallel_size,
        num_experts=config.moe.num_moe_experts,
        topk=config.moe.moe_router_topk,
        num_ranks=parallel_state.get_expert_model_parallel_world_size(),
        num_nodes=None if nodes is None else nodes.size,
        row_bytes=row_bytes(weight.shape[2], payload=payload, dtype=weight.dtype),
        rate=rate,
    )


def _profile(config: Config, layer: MoEMLP) -> LayerProfile:
    dispatcher, experts = layer.dispatcher, layer.experts
    assert isinstance(dispatcher, ExactDispatcher | HierarchicalDispatcher)
    weight, load = experts.linear_fc1, _load(config, layer)
    everybody = parallel_state.get_expert_model_parallel_group()
    legs = []
    for stream, channel, num_bytes in zip(
        streams_of(len(dispatcher.channels)), dispatcher.channels, load.leg_bytes, strict=True
    ):
        cost = measure_leg(
            channel.group, num_bytes=int(num_bytes), everybody=everybody, device=weight.device
        )
        legs.append(LegProfile(stream, cost))
    with torch.no_grad():
        costs = measure_experts(
            weight, experts.linear_fc2, num_rows=load.num_rows, everybody=everybody
        )
    return LayerProfile(tuple(legs), *costs)
