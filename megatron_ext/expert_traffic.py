"""Rows that travelled to experts and back in a step, and how many more it could have been.

A token goes once to each rank (or node, where the dispatcher is hierarchical) that has an expert it
chose, not once for each choice. With n choices whose expert is elsewhere, rows of b bytes and p
passes (there, home, and backward the same; there and home again where layers are recomputed)

    saved = p n b - bytes sent

Counted are the links between nodes where a route has two legs, between ranks where it has one. The
few numbers that travel beside rows (counts, weights) are in neither. Layers that compress say for
themselves what they send (`expert_compression`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ext.config import Config
from megatron_ext.metrics import Record
from megatron_ext.model import unwrap
from megatron_ext.moe_layer import MoEMLP
from moe.dispatch.channel import Channel


class ExpertTraffic:
    """What this rank's layers send, step by step."""

    def __init__(self, chunks: Sequence[nn.Module], config: Config) -> None:
        layers = [number for number, has_experts in enumerate(config.moe_layers) if has_experts]
        self._num_layers = len(layers)
        self._hidden_size = config.model.hidden_size
        parallel = config.parallel
        is_recomputed = parallel.recompute_granularity == "full" or (
            parallel.recompute_granularity == "selective" and "mlp" in parallel.recompute_modules
        )
        self._num_passes = 6 if is_recomputed else 4
        self._mlps: dict[int, MoEMLP] = {
            layers.index(layer.layer_number - 1): layer.mlp
            for chunk in chunks
            for layer in unwrap(chunk).decoder.layers
            if isinstance(layer.mlp, MoEMLP)
        }
        self._sent_before: dict[int, int] = {}

    def begin_step(self) -> None:
        """Before the first micro-batch."""
        self._sent_before = {
            row: channel.rows.num_bytes_sent for row, channel, _ in self._channels()
        }

    def metrics(self, rank_counts: Tensor) -> Record:
        """What was sent since `begin_step`, over all ranks; every rank calls this.

        Args:
            rank_counts: [num_layers, num_experts], choices of this rank's tokens in the step.
        """
        found = torch.zeros(self._num_layers, 2, dtype=torch.float64, device=rank_counts.device)
        for row, channel, row_bytes in self._channels():
            by_place = rank_counts[row].view(channel.size, -1).sum(dim=1).double()
            elsewhere = by_place.sum() - by_place[channel.group.rank()]
            sent = channel.rows.num_bytes_sent - self._sent_before[row]
            found[row, 0] = sent
            found[row, 1] = elsewhere * (self._num_passes * row_bytes) - sent
        dist.all_reduce(found)
        sent_bytes, saved_bytes = found.T.tolist()
        return {"expert_bytes_sent": sent_bytes, "expert_bytes_saved": saved_bytes}

    def _channels(self) -> list[tuple[int, Channel, int]]:
        """(row, channel of the first leg, bytes of a row) of layers that do not compress."""
        return [
            (
                row,
                mlp.dispatcher.channels[0],
                self._hidden_size * mlp.experts.linear_fc1.element_size(),
            )
            for row, mlp in self._mlps.items()
            if hasattr(mlp.dispatcher, "channels") and mlp.compressed is None
        ]
