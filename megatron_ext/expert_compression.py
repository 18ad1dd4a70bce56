"""Compression of what travels to the experts (LSH-MoE): in which layers, from when on, how well.

The layers named by `moe.moe_lsh_layers` get a second way beside their exact one, with hooks that
send centroids (`moe.dispatch.compressed`), and take it in training from step `moe_lsh_warmup_steps`
on. That depends on nothing but the step's number, and rotations on nothing but the seed and the
layer's, so a resumed run goes on as it would have.
Held-out text and samples always take the exact way: a centroid is a mean over later tokens as well,
and what a model is worth must not rest on having seen them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ext.config import Config
from megatron_ext.metrics import Record
from megatron_ext.model import unwrap
from megatron_ext.moe_layer import MoEMLP
from megatron_ext.token_dispatcher import legged_dispatcher
from moe.dispatch.compressed import Compression, Place
from moe.dispatch.exact import ExactDispatcher
from moe.dispatch.hierarchical import HierarchicalDispatcher
from moe.dispatch.payload import Wire
from moe.lsh.counters import CompressionCounters, CompressionReport
from moe.lsh.hash import draw_rotations
from moe.schedule.chunked import ChunkedExperts
from moe.schedule.serial import ExpertPath, SerialExperts

_SEEDS_PER_RUN = 10_000


_Legged = ExactDispatcher | HierarchicalDispatcher


class ExpertCompression:
    """The compressed ways of this rank's chunks."""

    def __init__(self, chunks: Sequence[nn.Module], config: Config) -> None:
        self._warmup_steps = config.moe.moe_lsh_warmup_steps
        self._layers = config.lsh_layers
        self._mlps: dict[int, MoEMLP] = {}
        """By the place of their layer in `lsh_layers`; so too the others."""
        self._hooks: dict[int, Compression] = {}
        self._dispatchers: dict[int, _Legged] = {}
        self._paths: dict[int, ExpertPath] = {}
        for chunk in chunks:
            for layer in unwrap(chunk).decoder.layers:
                if layer.layer_number - 1 in self._layers:
                    place = self._layers.index(layer.layer_number - 1)
                    self._add(place, layer.mlp, config)

    def _add(self, place: int, mlp: MoEMLP, config: Config) -> None:
        group = parallel_state.get_expert_model_parallel_group()
        dispatcher = legged_dispatcher(group, mlp.node_groups, wire=_wire(config))
        self._mlps[place] = mlp
        self._dispatchers[place] = dispatcher
        self._hooks[place] = _hooks(config, mlp, self._layers[place], dispatcher)
        self._paths[place] = SerialExperts(dispatcher, self._hooks[place])

    def cut_into_chunks(self, chunked: Callable[[_Legged, Compression], ChunkedExperts]) -> None:
        """Travel in chunks from the next step on.

        Args:
            chunked: the chunked way of a dispatcher and hooks.
        """
        for place, dispatcher in self._dispatchers.items():
            self._paths[place] = chunked(dispatcher, self._hooks[place])

    def begin_step(self, step: int) -> None:
        """Before the first micro-batch; step: counted from 0."""
        for place, mlp in self._mlps.items():
            is_on = step >= self._warmup_steps
            mlp.compressed = self._paths[place] if is_on else None

    def replace_exact(self) -> None:
        """From now on everything takes the compressed way, held-out text too: for studies."""
        for place, mlp in self._mlps.items():
            mlp.exact = self._paths[place]

    def metrics(self) -> Record:
        """What was done since the last call, over all ranks; every rank calls this.

        Returns:
            `lsh_rate` and `lsh_relative_error`, an entry for each compressed layer, and bytes
            of rows between ranks (nodes, where tokens travel hierarchically), forward, of these
            layers: `lsh_bytes`, and `lsh_exact_bytes` if each token had gone once to each that it
            needs.
        """
        sums = torch.zeros(len(self._layers), 6, dtype=torch.float64)
        for place, hooks in self._hooks.items():
            assert hooks.counters is not None
            sums[place] = hooks.counters.take().to_tensor()
        sums = sums.to(torch.cuda.current_device())
        dist.all_reduce(sums)
        reports = [CompressionReport.from_tensor(row) for row in sums.cpu()]
        return {
            "lsh_rate": [report.rate for report in reports],
            "lsh_relative_error": [report.relative_error for report in reports],
            "lsh_bytes": sum(report.num_bytes for report in reports),
            "lsh_exact_bytes": sum(report.num_exact_bytes for report in reports),
        }


def _wire(config: Config) -> Wire:
    payload = config.moe.moe_lsh_payload
    return Wire(payload, payload if config.moe.moe_lsh_payload_gradients else "none")


def _hooks(config: Config, mlp: MoEMLP, layer: int, dispatcher: _Legged) -> Compression:
    moe, weight = config.moe, mlp.router.weight
    assert moe.moe_lsh_num_hashes is not None
    rotations: Tensor = draw_rotations(
        config.model.hidden_size,
        num_hashes=moe.moe_lsh_num_hashes,
        hash_dim=moe.moe_lsh_hash_dim,
        seed=moe.moe_lsh_seed * _SEEDS_PER_RUN + layer,
    )
    places = dispatcher.channels[0]
    return Compression(
        rotations=rotations.to(weight),
        residual_scale=moe.moe_lsh_residual_scale,
        centroid=moe.moe_lsh_centroid,
        num_refinements=moe.moe_lsh_num_refinements,
        payload=moe.moe_lsh_payload,
        place=Place(places.group.rank(), places.size),
        counters=CompressionCounters(),
    )
