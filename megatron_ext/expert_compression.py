"""Compression of what travels to the experts (LSH-MoE): in which layers, from when on, how well.

The layers named by `moe.moe_lsh_layers` get a second dispatcher beside their exact one and use it
in training from step `moe_lsh_warmup_steps` on. That depends on nothing but the step's number, and
rotations on nothing but the seed and the layer's, so a resumed run goes on as it would have.
Held-out text and samples always take the exact way: a centroid is a mean over later tokens as well,
and what a model is worth must not rest on having seen them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ext.config import Config
from megatron_ext.metrics import Record
from megatron_ext.model import unwrap
from megatron_ext.moe_layer import MoEMLP
from moe.dispatch.compressed import CompressedDispatcher
from moe.dispatch.per_expert import Wire
from moe.lsh.counters import CompressionCounters, CompressionReport
from moe.lsh.hash import draw_rotations

_SEEDS_PER_RUN = 10_000


class ExpertCompression:
    """The compressed dispatchers of this rank's chunks."""

    def __init__(self, chunks: Sequence[nn.Module], config: Config) -> None:
        self._warmup_steps = config.moe.moe_lsh_warmup_steps
        self._layers = config.lsh_layers
        self._dispatchers: dict[int, CompressedDispatcher] = {}
        """By the place of their layer in `lsh_layers`."""
        self._mlps: dict[int, MoEMLP] = {}
        for chunk in chunks:
            for layer in unwrap(chunk).decoder.layers:
                if layer.layer_number - 1 in self._layers:
                    place = self._layers.index(layer.layer_number - 1)
                    self._mlps[place] = layer.mlp
                    self._dispatchers[place] = _dispatcher(config, layer.mlp, self._layers[place])

    def begin_step(self, step: int) -> None:
        """Before the first micro-batch; step: counted from 0."""
        for place, mlp in self._mlps.items():
            is_on = step >= self._warmup_steps
            mlp.compressed_dispatcher = self._dispatchers[place] if is_on else None

    def replace_exact(self) -> None:
        """From now on everything takes the compressed way, held-out text too: for studies."""
        for place, mlp in self._mlps.items():
            mlp.dispatcher = self._dispatchers[place]

    def metrics(self) -> Record:
        """What was done since the last call, over all ranks; every rank calls this.

        Returns:
            `lsh_rate` and `lsh_relative_error`, an entry for each compressed layer, and bytes
            between ranks, forward, of these layers: `lsh_bytes`, and `lsh_exact_bytes` if each
            token had gone once to each rank that it needs.
        """
        sums = torch.zeros(len(self._layers), 6, dtype=torch.float64)
        for place, dispatcher in self._dispatchers.items():
            assert dispatcher.counters is not None
            sums[place] = dispatcher.counters.take().to_tensor()
        sums = sums.to(torch.cuda.current_device())
        dist.all_reduce(sums)
        reports = [CompressionReport.from_tensor(row) for row in sums.cpu()]
        return {
            "lsh_rate": [report.rate for report in reports],
            "lsh_relative_error": [report.relative_error for report in reports],
            "lsh_bytes": sum(report.num_bytes for report in reports),
            "lsh_exact_bytes": sum(report.num_exact_bytes for report in reports),
        }


def _dispatcher(config: Config, mlp: MoEMLP, layer: int) -> CompressedDispatcher:
    moe, weight = config.moe, mlp.router.weight
    assert moe.moe_lsh_num_hashes is not None
    rotations: Tensor = draw_rotations(
        config.model.hidden_size,
        num_hashes=moe.moe_lsh_num_hashes,
        hash_dim=moe.moe_lsh_hash_dim,
        seed=moe.moe_lsh_seed * _SEEDS_PER_RUN + layer,
    )
    group = parallel_state.get_expert_model_parallel_group()
    return CompressedDispatcher(
        rotations=rotations.to(weight),
        residual_scale=moe.moe_lsh_residual_scale,
        centroid=moe.moe_lsh_centroid,
        num_refinements=moe.moe_lsh_num_refinements,
        group=group if group.size() > 1 else None,
        wire=Wire(
            payload=moe.moe_lsh_payload,
            gradient_payload=moe.moe_lsh_payload if moe.moe_lsh_payload_gradients else "none",
        ),
        counters=CompressionCounters(),
    )
