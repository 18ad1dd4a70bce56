"""A row for each token and expert, in place of one for each token and rank.

    tokens -> rows by expert -> any dispatcher, each row with one expert and weight 1 -> rows
    y_t = sum_i weight_ti row_ti        at home

What travels for an expert is then not what travels for another one, as it must be where rows are
means of different tokens for each (`moe.dispatch.compressed`). A token that goes to several experts
of one rank goes there several times.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe.dispatch.hooks import Hooks
from moe.permutation import Permutation, order_by_expert, permute, unpermute
from moe.records import Routing


@dataclass(frozen=True, slots=True)
class ByExpert:
    """The choices of a routing that lead somewhere, expert by expert.

    Attributes:
        experts: int64 [num_rows], ascending.
    """

    experts: Tensor
    weights: Tensor
    permutation: Permutation

    def combine(self, answers: Tensor) -> Tensor:
        """[num_tokens, hidden_size]: the weighted sums of answers [num_rows, hidden_size]."""
        return unpermute(answers, self.weights, self.permutation)


def by_expert(routing: Routing) -> ByExpert:
    """The host waits for a GPU if the routing has choices that lead nowhere."""
    permutation = order_by_expert(routing.experts, num_rows=routing.num_rows())
    experts = routing.experts.reshape(-1)[permutation.choices]
    return ByExpert(experts, routing.weights, permutation)


def one_expert_each(experts: Tensor, counts: Tensor, weights: Tensor) -> Routing:
    """The routing of rows with one expert each.

    Args:
        experts: int64 [num_rows].
        counts: int64 [num_experts], rows of each.
        weights: any, of the dtype that the new ones, all 1, get.
    """
    experts = experts[:, None]
    probabilities = weights.new_zeros(len(experts), counts.numel()).scatter_(1, experts, 1.0)
    return Routing(
        experts=experts,
        weights=weights.new_ones(experts.shape),
        probabilities=probabilities,
        counts=counts,
    )


class PerExpert(Hooks):
    """Each choice travels by itself; what compression is compared with."""

    def before_dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        self._rows = rows = by_expert(routing)
        sent = permute(tokens, rows.permutation)
        return sent, one_expert_each(rows.experts, routing.counts, routing.weights.detach())

    def after_combine(self, outputs: Tensor) -> Tensor:
        return self._rows.combine(outputs)
