"""How tokens come to their experts and back: one protocol for all ways.

    sent, its_routing = hooks.before_dispatch(tokens, routing)
    trip = dispatcher.dispatch(sent, its_routing, hooks)      calls hooks.after_dispatch
    outputs = experts(trip.rows, trip.counts)
    home = trip.combine(outputs)                              calls hooks.before_combine
    output = hooks.after_combine(home)

`dispatch` brings copies of the tokens to the ranks of their experts, `combine` brings the answers
home and adds them up with their weights; `moe.schedule.serial` does all of it. A layer that cuts
its tokens into chunks makes one trip for each. All ranks of an expert-parallel group make the same
trips in the same order, also those without tokens; backward each trip happens again in reverse.

Exact and hierarchical trips are lists of legs (`moe.dispatch.leg`), which a scheduler can also
start by itself: `moe.dispatch.route` says where rows go, apart from going.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moe.dispatch.hooks import Hooks
from moe.records import Routing


class Trip(Protocol):
    """Tokens at their experts.

    Attributes:
        rows: [num_rows, hidden_size], for the experts of this rank, those of the first one first.
        counts: int64 [num_local_experts], rows of each.
    """

    @property
    def rows(self) -> Tensor: ...

    @property
    def counts(self) -> Tensor: ...

    def combine(self, outputs: Tensor) -> Tensor:
        """The weighted sum of each token's answers.

        Args:
            outputs: [num_rows, hidden_size], in the order of `rows`.

        Returns:
            [num_tokens, hidden_size] of the tokens that this rank sent out.
        """
        ...


class Dispatcher(Protocol):
    """A way for tokens to travel."""

    def dispatch(self, tokens: Tensor, routing: Routing, hooks: Hooks) -> Trip:
        """Send this rank's tokens [num_tokens, hidden_size] where `routing` says.

        Args:
            hooks: those at the experts' end are called by the trip, those at home by the caller.
        """
        ...
