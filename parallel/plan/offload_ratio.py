"""How much of a long sequence's activations go to host memory, so that fewer ranks hold it.

A rank's memory holds the activations of C tokens in l layers. If the part r of all layers but two
(double buffers) is sent to the host while the next layer computes, t tokens take

    t (1 - r (l - 2) / l)  <=  C

With s / D tokens on each of D ranks, ByteScale (section 5.2, equation 3; arXiv 2502.21231) asks for
the fewest ranks:

    argmin_r D(s) = ceil(s (1 - r (l - 2) / l) / C)    with    r Act(s) <= T(s) B

T and Act: forward seconds and activation bytes of one layer, both of the whole sequence (each of D
ranks has 1 / D of both), B the bytes per second to the host. T grows with s^2, Act with s: short
sequences cannot hide it, very long ones hide all of it. Of all r with the same D the least is
taken. The paper's further condition on r contradicts this one for short sequences; it is left out.
"""

import math
from dataclasses import dataclass

from parallel.plan.cost import CostModel
from parallel.plan.flops import ModelShape
from parallel.plan.input_check import check_numbers, check_positive

# Layers that stay on the device: the one that computes and the one that is moved.
_NUM_KEPT_LAYERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Where activations may go, as one rank sees it."""

    num_layers: int
    """Of the rank."""
    activation_bytes: float
    """That one layer saves for the backward pass, per token."""
    bytes_per_second: float
    """To the host or back, whichever is slower, while all ranks of the machine copy."""

    def __post_init__(self) -> None:
        """Raise PlanError for numbers that no rank has."""
        check_numbers(num_layers=self.num_layers)
        check_positive(
            activation_bytes=self.activation_bytes, bytes_per_second=self.bytes_per_second
        )

    @classmethod
    def from_model(
        cls, shape: ModelShape, *, bytes_per_second: float, bytes_per_element: int = 2
    ) -> "HostMemory":
        """From the layers that one rank holds, nothing recomputed, flash attention.

        A token saves the inputs of both norms and of both linear maps behind them (4 h), query,
        keys, values and output of attention (2 (h_q + h_kv)), gate, up and their product (3 f, of
        experts those that one token meets; the mean over layers).
        """
        heads = shape.num_attention_heads + shape.num_query_groups
        num_dense = shape.num_layers - shape.num_moe_layers
        widths = (
            num_dense * shape.ffn_hidden_size + shape.num_moe_layers * shape.moe_active_ffn_size
        )
        ffn_size = widths / shape.num_layers
        numbers = 4 * shape.hidden_size + 2 * heads * shape.kv_channels + 3 * ffn_size
        return cls(
            num_layers=shape.num_layers,
            activation_bytes=float(bytes_per_element * numbers),
            bytes_per_second=bytes_per_second,
        )

    @property
    def offloadable(self) -> float:
        """(l - 2) / l: the share of a rank's activations that may leave the device."""
        return max(0.0, (self.num_layers - _NUM_KEPT_LAYERS) / self.num_layers)

    def most_ratio(self, length: int, cost_model: CostModel) -> float:
        """The largest r whose copies hide behind the forward pass of this sequence."""
        seconds = cost_model.forward_seconds(length) / self.num_layers
        return min(1.0, seconds * self.bytes_per_second / (self.activation_bytes * length))

    def ratio(self, num_tokens: int, *, tokens_per_rank: int) -> float:
        """The least r with which a rank holds so many tokens."""
        if num_tokens <= tokens_per_rank:
            return 0.0
        return min(1.0, (1.0 - tokens_per_rank / num_tokens) / self.offloadable)


def fewest_ranks(
    length: int, tokens_per_rank: int, cost_model: CostModel, host_memory: HostMemory | None
) -> int:
    """D(s) with as much offloading as hides; s / C rounded up without host memory."""
    if length <= tokens_per_rank or host_memory is None:
        return -(-length // tokens_per_rank)
    kept = 1.0 - host_memory.most_ratio(length, cost_model) * host_memory.offloadable
    num_ranks = max(1, math.floor(length * kept / tokens_per_rank))
    # The fullest rank has a token more than the mean, and rounding may go either way.
    while -(-length // num_ranks) * kept > tokens_per_rank:
        num_ranks += 1
    return num_ranks
