"""Offload of activations in megatron's decoders: who tells `parallel.offload` where a layer begins.

Each model chunk's decoder gets the micro-batch's ratio with its packing record. Around its forward
pass saved tensors are taken in; a hook before each layer says which one runs. That covers
recomputation too: a checkpoint saves its input while the decoder runs, and what it computes again
in backward runs outside of it. A micro-batch of ratio 0 passes as if nothing were installed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_ext.batch import PackedDocuments
from megatron_ext.model import unwrap
from parallel.attention.record_tensors import tensors_in
from parallel.offload.forward_pass import ForwardPass
from parallel.offload.offload import Offload
from parallel.offload.shuttle import OffloadCount, Shuttle


class ActivationOffload:
    """What `install_offload` put around the decoders of this rank."""

    def __init__(self, chunks: Sequence[nn.Module], shuttle: Shuttle) -> None:
        models = [unwrap(chunk) for chunk in chunks]
        decoders: list[TransformerBlock] = [model.decoder for model in models]
        config = decoders[0].config
        self._num_started: Counter[int] = Counter()
        self._offload = Offload(
            shuttle,
            num_layers=sum(len(decoder.layers) for decoder in decoders),
            weights=chain.from_iterable((*m.parameters(), *m.buffers()) for m in models),
            successor=InterleavedOrder(
                num_chunks=len(chunks),
                group_size=config.microbatch_group_size_per_vp_stage
                or config.pipeline_model_parallel_size,
            ),
        )
        first_layer = 0
        for chunk, decoder in enumerate(decoders):
            # The decoder keeps it: it takes the place of the forward pass.
            _WatchedDecoder(decoder, self._offload, self._num_started, chunk, first_layer)
            first_layer += len(decoder.layers)

    def end_step(self) -> OffloadCount:
        """Bytes that were moved in this step; call it after each step's last backward pass."""
        self._num_started.clear()
        return self._offload.end_step()


def install_offload(
    chunks: Sequence[nn.Module], *, device: torch.device, shuttle: Shuttle | None = None
) -> ActivationOffload:
    """Let micro-batches with an `offload_ratio` keep part of their activations on the host.

    Args:
        chunks: this rank's model chunks, in the order in which it runs them; wrapped or not.
        device: where the model is.
        shuttle: how bytes travel; by default as the device can.
    """
    return ActivationOffload(chunks, shuttle or Shuttle(device))


@dataclasses.dataclass(frozen=True, slots=True)
class InterleavedOrder:
    """Backward order of (micro-batch, chunk) under interleaved pipelining.

    Micro-batches run in groups; a group runs all of its micro-batches through one chunk before it
    goes to the next, in backward from the last chunk to the first (megatron's
    `get_schedule_table`).
    """

    num_chunks: int
    group_size: int

    def __call__(self, name: Hashable) -> Hashable:
        """Which one may follow; where the group ends early, nothing of that name exists."""
        assert isinstance(name, tuple)
        micro_batch, chunk = name
        if (micro_batch + 1) % self.group_size:
            return micro_batch + 1, chunk
        if chunk > 0:
            return micro_batch + 1 - self.group_size, chunk - 1
        return micro_batch + 1, self.num_chunks - 1


class _WatchedDecoder:
    """One decoder with its forward pass wrapped."""

    def __init__(
        self,
        decoder: TransformerBlock,
        offload: Offload,
        num_started: Counter[int],
        chunk: int,
        first_layer: int,
    ) -> None:
        self._decoder, self._offload = decoder, offload
        self._num_started, self._chunk = num_started, chunk
        self._running: ForwardPass | None = None
        self._forward: Callable[..., Tensor] = decoder.forward
        decoder.forward = self._watched_forward
        for index, layer in enumerate(decoder.layers, start=first_layer):
            layer.register_forward_pre_hook(self._layer_begins(index))

    def _layer_begins(self, index: int) -> Callable[..., None]:
        def begin(*_: object) -> None:
            # A layer that is computed again, in backward, runs outside of the decoder.
            if self._running is not None:
                self._running.begin_layer(index)

        return begin

    def _watched_forward(self, hidden_states: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self._forward(hidden_states, *args, **kwargs)
        name = self._num_started[self._chunk], self._chunk
        self._num_started[self._chunk] += 1
        documents = kwargs.get("packed_seq_params")
        if not isinstance(documents, PackedDocuments) or documents.offload_ratio == 0.0:
            return self._forward(hidden_states, *args, **kwargs)
        received = [] if self._decoder.pre_process else [self._decoder.input_tensor]
        row = hidden_states if self._decoder.pre_process else self._decoder.input_tensor
        assert row is not None
        with self._offload.forward_pass(
            documents.offload_ratio,
            num_tokens=self._token_dims(row.shape[0], documents),
            # The schedule holds what it received until its gradient goes back.
            shared=[*tensors_in((args, kwargs)), *received],
            name=name,
        ) as self._running:
            try:
                return self._forward(hidden_states, *args, **kwargs)
            finally:
                self._running = None

    def _token_dims(self, num_local_tokens: int, documents: PackedDocuments) -> list[int]:
        """First dims of the layers' tensors that hold tokens.

        With sequence parallelism attention sees the whole row, and where ranks exchange heads all
        tokens of a ring and, apart, its own whole sequences.
        """
        config = self._decoder.config
        factor = config.tensor_model_parallel_size if config.sequence_parallel else 1
        dims = [num_local_tokens, num_local_tokens * factor]
        if documents.rows is not None and documents.rows.ulysses:
            dims.append(documents.rows.num_whole)
            dims += [ring.source.shape[0] for ring in documents.rows.ulysses]
        return dims
