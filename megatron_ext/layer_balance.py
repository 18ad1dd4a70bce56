"""Balance of one layer's experts: what its router counts, keeps and adds in each micro-batch.

No collective happens here, for ranks run different numbers of micro-batches. The losses over one
micro-batch or one document are known at once and are attached to the weights of the choice. That
over the global batch is known when the step is over: here its tokens are counted and the router's
inputs kept, and its gradient in the hidden states is that of the step before (`expert_balance`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.batch import PackedDocuments
from moe.balance import balance_loss, device_excess, excess_load, sequence_balance_loss
from moe.deferred_balance import Gate, GateInputs, push_back
from moe.records import Routing
from moe.side_loss import attach_loss


class LayerBalance:
    """What stands beside one router.

    Attributes:
        inputs: the router's inputs of this step, where the loss over the global batch needs them.
    """

    def __init__(
        self,
        coefficients: Mapping[str, float],
        *,
        num_groups: int,
        last_demand: Tensor,
        statistics: Tensor,
        inputs: GateInputs,
    ) -> None:
        """
        Args:
            coefficients: of `Config.balance_coefficients`.
            num_groups: devices of `device_aux_loss`.
            last_demand: int64 [num_experts], choices of each expert in the step before; read in
                each backward pass.
            statistics: float64 [3 * num_experts + 2], see `add`; zeroed by its owner.
            inputs: keeps what the loss over the global batch needs.
        """
        self._coefficients, self._num_groups = coefficients, num_groups
        self._last_demand, self._statistics = last_demand, statistics
        self.inputs = inputs

    @property
    def is_deferred(self) -> bool:
        """Whether a loss is over the global batch."""
        return not self._coefficients.keys().isdisjoint({"global_aux_loss", "device_aux_loss"})

    def excess(self, demand: Tensor) -> Tensor:
        """Weights of the losses over the global batch, added up; float32 [num_experts].

        Args:
            demand: [num_experts], choices of each expert in a global batch.
        """
        excess = excess_load(demand)
        device = device_excess(excess, num_groups=self._num_groups)
        weight = self._coefficients.get
        return weight("global_aux_loss", 0.0) * excess + weight("device_aux_loss", 0.0) * device

    def take(self, tokens: Tensor, gate: Gate) -> Tensor:
        """The router's input [num_tokens, hidden_size], to be used in its place."""
        if not self.is_deferred:
            return tokens
        self.inputs.add(tokens)
        return push_back(tokens, gate, lambda: self.excess(self._last_demand))

    def add(self, routing: Routing, documents: PackedDocuments | None) -> Routing:
        """Count a choice, and attach the losses of this micro-batch to its weights.

        Statistics are choices computed, choices wanted and probabilities, each [num_experts], then
        the excess T (LBL - 1) of this micro-batch, and of its documents.
        """
        micro_batch, sequence = self._micro_batch_loss(routing), self._loss_of(routing, documents)
        with torch.no_grad():
            parts = [routing.counts, routing.demand, routing.probabilities.sum(dim=0)]
            parts += [micro_batch[None], sequence[None]]
            self._statistics += torch.cat([part.detach().double() for part in parts])
        weight = self._coefficients.get
        loss = weight("aux_loss", 0.0) * micro_batch + weight("seq_aux_loss", 0.0) * sequence
        if not loss.requires_grad:
            return routing
        return replace(routing, weights=attach_loss(routing.weights, loss))

    def _micro_batch_loss(self, routing: Routing) -> Tensor:
        if "aux_loss" not in self._coefficients:
            return routing.probabilities.new_zeros(())
        return balance_loss(routing.probabilities, excess_load(routing.demand))

    def _loss_of(self, routing: Routing, documents: PackedDocuments | None) -> Tensor:
        if "seq_aux_loss" not in self._coefficients:
            return routing.probabilities.new_zeros(())
        assert documents is not None
        size = parallel_state.get_tensor_model_parallel_world_size()
        first = documents.row_length // size * parallel_state.get_tensor_model_parallel_rank()
        return sequence_balance_loss(
            routing.probabilities,
            routing.wanted,
            documents.sequences[first : first + routing.num_tokens],
            num_sequences=len(documents.sequence_lengths) + 1,
        )
