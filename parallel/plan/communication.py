"""What sharing a sequence costs: key and value blocks round a ring, or heads by all-to-all.

D ranks hold t = s / D tokens each of a sequence. In a ring each passes blocks of keys and values to
its neighbour D - 1 times while it computes with the block that it has:

    exposed = (D - 1) max(0, t_hop - t_compute) + latency
    t_hop   = latency + t bytes / bandwidth          t_compute = a_forward t^2

A hop's computation grows with t^2, its bytes with t: from t_min tokens per rank on, a hop is
hidden. So s / t_min ranks can share a sequence for nothing. Backward has the same form: keys and
values go round again and their gradients, in float32, with them (3 times the bytes), against 2.5
times the computation.

All-to-all (Ulysses; arXiv 2309.14509) instead gives each rank all tokens of 1 / D of the heads:
queries, keys and values there, the output back. Fewer bytes for many ranks with few tokens each,
but nothing hides them:

    exposed = 2 (latency + (2 h_q + 2 h_kv) t b (D - 1) / D / bandwidth)      forward and backward
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.plan.flops import ModelShape
from parallel.plan.input_check import check_constants, check_positive

# Flash attention's backward over its forward: five products in place of two.
ATTENTION_BACKWARD = 2.5

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RingCost:
    """Bytes and speed of the exchange between ranks that share a sequence."""

    bytes_per_second: float
    """Of one rank's link, one way, while all ranks send."""
    key_value_bytes: float
    """Keys and values of one token in all layers that a rank holds: what one ring hop carries."""
    query_bytes: float = 0.0
    """Queries of one token in all layers; only an all-to-all moves them."""
    latency_seconds: float = 0.0
    """Start of one hop, summed over the layers that a rank holds."""
    backward_factor: float = 3.0
    """Bytes of a backward hop over those of a forward hop."""
    num_query_groups: int = 0
    """Heads of keys and values: an all-to-all needs a divisor of it. 0: rings only."""

    def __post_init__(self) -> None:
        """Raise PlanError for constants that no link has."""
        check_positive(bytes_per_second=self.bytes_per_second)
        check_constants(
            key_value_bytes=self.key_value_bytes,
            query_bytes=self.query_bytes,
            latency_seconds=self.latency_seconds,
            backward_factor=self.backward_factor,
            num_query_groups=self.num_query_groups,
        )

    @classmethod
    def from_model(
        cls,
        shape: ModelShape,
        *,
        bytes_per_second: float,
        latency_seconds: float = 0.0,
        bytes_per_element: int = 2,
    ) -> "RingCost":
        """From the layers that one rank holds; `latency_seconds` is that of one message."""
        head_bytes = bytes_per_element * shape.kv_channels * shape.num_layers
        return cls(
            bytes_per_second=bytes_per_second,
            key_value_bytes=2 * shape.num_query_groups * head_bytes,
            query_bytes=shape.num_attention_heads * head_bytes,
            latency_seconds=latency_seconds * shape.num_layers,
            # Gradients of keys and values travel in float32 beside the keys and values.
            backward_factor=1.0 + 4.0 / bytes_per_element,
            num_query_groups=shape.num_query_groups,
        )

    def ring_bytes(self, tokens: float, num_ranks: int) -> float:
        """What one rank sends, forward and backward, with blocks of `tokens` tokens."""
        return (1 + self.backward_factor) * self.key_value_bytes * tokens * (num_ranks - 1)

    def ulysses_bytes(self, tokens: float, num_ranks: int) -> float:
        """What one rank sends, forward and backward, in all-to-alls."""
        per_token = 2 * (2 * self.query_bytes + self.key_value_bytes)
        return per_token * tokens * (num_ranks - 1) / num_ranks

    def ring_seconds(
        self, num_ranks: npt.ArrayLike, *, block_tokens: npt.ArrayLike, hop_seconds: npt.ArrayLike
    ) -> FloatArray:
        """Exposed seconds of each rank of a ring, forward and backward; elementwise.

        block_tokens: the largest block that travels, which sets the pace. hop_seconds: attention,
        forward and backward, between a rank's queries and one mean block.
        """
        ranks = np.asarray(num_ranks, dtype=np.float64)
        forward_hop = np.asarray(hop_seconds, dtype=np.float64) / (1 + ATTENTION_BACKWARD)
        transfer = np.asarray(block_tokens) * (self.key_value_bytes / self.bytes_per_second)
        forward = np.maximum(0.0, self.latency_seconds + transfer - forward_hop)
        backward = np.maximum(
            0.0,
            self.latency_seconds
            + transfer * self.backward_factor
            - forward_hop * ATTENTION_BACKWARD,
        )
        exposed = (ranks - 1) * (forward + backward) + 2 * self.latency_seconds
        return np.where(ranks > 1, exposed, 0.0)

    def ulysses_seconds(
        self, num_ranks: npt.ArrayLike, *, block_tokens: npt.ArrayLike
    ) -> FloatArray:
        """Seconds of each rank, forward and backward; infinite where heads do not allow it."""
        ranks = np.asarray(num_ranks, dtype=np.float64)
        per_token = 2 * (2 * self.query_bytes + self.key_value_bytes) / self.bytes_per_second
        moved = per_token * np.asarray(block_tokens) * (ranks - 1) / ranks
        divides = (self.num_query_groups % ranks == 0) & (self.num_query_groups > 0)
        seconds = np.where(divides, 2 * self.latency_seconds + moved, np.inf)
        return np.where(ranks > 1, seconds, 0.0)

    def hidden_tokens(self, quadratic_seconds: float) -> float:
        """t_min: the fewest tokens per rank whose computation hides both passes' hops.

        quadratic_seconds: a of `cost.CostModel`, so that a hop of t tokens computes for a t^2.
        """
        forward = quadratic_seconds / (1 + ATTENTION_BACKWARD)
        per_token = self.key_value_bytes / self.bytes_per_second
        return max(
            _hidden_tokens(forward, per_token, self.latency_seconds),
            _hidden_tokens(
                forward * ATTENTION_BACKWARD,
                per_token * self.backward_factor,
                self.latency_seconds,
            ),
        )


def _hidden_tokens(quadratic: float, linear: float, constant: float) -> float:
    """The least t from which on quadratic t^2 >= linear t + constant."""
    if linear == 0.0 and constant == 0.0:
        return 0.0
    if quadratic == 0.0:
        return math.inf
    return (linear + math.sqrt(linear * linear + 4 * quadratic * constant)) / (2 * quadratic)
