"""An expert layer, one thing after another; and what every way to run one is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe.dispatch.hooks import HookMaker, Hooks
from moe.dispatch.protocol import Dispatcher
from moe.experts import run_experts
from moe.records import Routing


class ExpertPath(Protocol):
    """Dispatch, experts and combine of one layer."""

    def __call__(
        self, tokens: Tensor, routing: Routing, linear_fc1: Tensor, linear_fc2: Tensor
    ) -> Tensor:
        """The routed output [num_tokens, hidden_size]; every rank of the group calls this together.

        Args:
            tokens: [num_tokens, hidden_size]; none is fine.
            linear_fc1: [num_local_experts, 2 * ffn_size, hidden_size], gate first.
            linear_fc2: [num_local_experts, hidden_size, ffn_size].
        """
        ...


class RunExperts(Protocol):
    """Each row through its expert; see `moe.experts.run_experts`."""

    def __call__(
        self, rows: Tensor, counts: Tensor, linear_fc1: Tensor, linear_fc2: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class SerialExperts:
    """Waits for each exchange; see `ExpertPath`."""

    dispatcher: Dispatcher
    make_hooks: HookMaker = Hooks
    run_experts: RunExperts = run_experts

    def __call__(
        self, tokens: Tensor, routing: Routing, linear_fc1: Tensor, linear_fc2: Tensor
    ) -> Tensor:
        hooks = self.make_hooks()
        sent, routing = hooks.before_dispatch(tokens, routing)
        trip = self.dispatcher.dispatch(sent, routing, hooks)
        outputs = self.run_experts(trip.rows, trip.counts, linear_fc1, linear_fc2)
        return hooks.after_combine(trip.combine(outputs))
