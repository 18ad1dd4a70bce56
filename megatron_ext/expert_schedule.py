"""Expert layers whose tokens travel in chunks while others are computed (FSMoE).

Numbers of chunks come from the configuration, or from a measurement at the start of a run that all
ranks of an expert-parallel group make together and agree on: of this network's legs and of the
experts of the first such layer. All layers have the same shape, so one choice serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state
from torch import nn

from megatron_ext.config import Config
from megatron_ext.model import unwrap
from megatron_ext.moe_layer import MoEMLP
from moe.dispatch.exact import ExactDispatcher
from moe.dispatch.hierarchical import HierarchicalDispatcher
from moe.schedule.choose import Chunking
from moe.schedule.choose_layer import LayerLoad, choose_for
from moe.schedule.chunked import ChunkedExperts, streams_of
from moe.schedule.lanes import lanes_for
from moe.schedule.profile import LayerProfile, LegProfile, measure_experts, measure_leg


def schedule_experts(
    chunks: Sequence[nn.Module], config: Config, *, say: Callable[[str], None]
) -> None:
    """Give the layers of this rank's chunks their schedule; every rank calls this together."""
    moe = config.moe
    layers = [
        layer.mlp
        for chunk in chunks
        for layer in unwrap(chunk).decoder.layers
        if isinstance(layer.mlp, MoEMLP)
    ]
    if moe.moe_num_chunks == 1 and moe.moe_num_backward_chunks in (None, 1):
        return
    scheduled = [
        layer
        for layer in layers
        if isinstance(layer.dispatcher, ExactDispatcher | HierarchicalDispatcher)
    ]
    if not scheduled:
        return
    lanes = lanes_for(scheduled[0].experts.linear_fc1.device)
    forward, backward = _passes(config, scheduled[0])
    say(f"experts travel in {forward.num_chunks} chunks, backward in {backward.num_chunks}")
    for layer in scheduled:
        assert isinstance(layer.dispatcher, ExactDispatcher | HierarchicalDispatcher)
        layer.chunked_experts = ChunkedExperts(
            layer.dispatcher, lanes, forward=forward, backward=backward
        )


def _passes(config: Config, layer: MoEMLP) -> tuple[Chunking, Chunking]:
    """As the configuration says, measured where it says auto."""
    forward = config.moe.moe_num_chunks
    backward = config.moe.moe_num_backward_chunks or forward
    if "auto" not in (forward, backward):
        return Chunking.of(int(forward)), Chunking.of(int(backward))
    chosen = _measured(config, layer)
    return (
        chosen[0] if forward == "auto" else Chunking.of(forward),
        chosen[1] if backward == "auto" else Chunking.of(backward),
    )


def _measured(config: Config, layer: MoEMLP) -> tuple[Chunking, Chunking]:
    dispatcher, experts = layer.dispatcher, layer.experts
    assert isinstance(dispatcher, ExactDispatcher | HierarchicalDispatcher)
    assert config.moe.num_moe_experts is not None
    weight = experts.linear_fc1
    everybody = parallel_state.get_expert_model_parallel_group()
    is_hierarchical = isinstance(dispatcher, HierarchicalDispatcher)
    load = LayerLoad(
        num_tokens=config.data.micro_batch_tokens // config.parallel.tensor_model_parallel_size,
        num_experts=config.moe.num_moe_experts,
        topk=config.moe.moe_router_topk,
        num_ranks=everybody.size(),
        num_nodes=dispatcher.channels[0].size if is_hierarchical else None,
        row_bytes=weight.shape[2] * weight.element_size(),
    )
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
    return choose_for(LayerProfile(tuple(legs), *costs), load)
