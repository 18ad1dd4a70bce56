"""Seconds of a sequence and of a micro-batch, from three numbers.

A sequence of s tokens costs a s^2 + b s seconds, forward and backward: a from causal attention, b
from everything that is done token by token. Each micro-batch costs g more, whatever it holds:
launching kernels, reading weights. The three are measured on a device, or estimated from the
model's shape and the device's speed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.errors import PlanError
from parallel.plan.communication import ATTENTION_BACKWARD, FloatArray, RingCost
from parallel.plan.flops import ModelShape
from parallel.plan.input_check import check_constants

# Backward over forward in linear layers: gradients of input and of weight.
_LINEAR_BACKWARD = 2.0


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds that one rank spends, forward and backward."""

    quadratic_seconds: float
    """a: per square of a sequence's tokens."""
    linear_seconds: float
    """b: per token."""
    fixed_seconds: float
    """g: per micro-batch."""
    communication: RingCost | None = None
    """Of ranks that share a sequence; None: their exchange costs nothing."""

    def __post_init__(self) -> None:
        """Raise PlanError for constants by which plans cannot be compared."""
        check_constants(
            quadratic_seconds=self.quadratic_seconds,
            linear_seconds=self.linear_seconds,
            fixed_seconds=self.fixed_seconds,
        )
        if not self.quadratic_seconds + self.linear_seconds:
            raise PlanError("quadratic_seconds and linear_seconds are both 0; one must be above")

    @classmethod
    def from_model(
        cls,
        shape: ModelShape,
        *,
        flops_per_second: float,
        fixed_seconds: float = 0.0,
        communication: RingCost | None = None,
    ) -> "CostModel":
        """Estimate from the layers (and output layer) that one rank holds.

        flops_per_second is what the rank attains, not its peak. Attention over s tokens has
        s (s + 1) / 2 pairs; with F forward FLOPs per pair (4 num_attention_heads kv_channels
        num_layers) and backward 2.5 times forward it costs 3.5 F (s^2 + s) / 2, so

            a = 3.5 F / 2 / flops_per_second
            b = (3 * 2 N_mat) / flops_per_second + a

        with N_mat from `flops.ModelShape` and backward twice forward in linear layers.
        """
        attention = (1 + ATTENTION_BACKWARD) * shape.forward_flops_per_pair / 2
        linear = (1 + _LINEAR_BACKWARD) * shape.forward_flops_per_token
        return cls(
            quadratic_seconds=attention / flops_per_second,
            linear_seconds=(linear + attention) / flops_per_second,
            fixed_seconds=fixed_seconds,
            communication=communication,
        )

    def sequence_seconds(self, length: int) -> float:
        """a s^2 + b s of a whole sequence."""
        return (self.quadratic_seconds * length + self.linear_seconds) * length

    def forward_seconds(self, length: int) -> float:
        """The forward pass's part of `sequence_seconds`."""
        attention = self.quadratic_seconds * length / (1 + ATTENTION_BACKWARD)
        return (attention + self.linear_seconds / (1 + _LINEAR_BACKWARD)) * length

    def pieces_seconds(self, start: npt.ArrayLike, end: npt.ArrayLike) -> FloatArray:
        """Tokens start..end of sequences, which see all tokens before them; elementwise.

        The pieces of a sequence add up to the sequence.
        """
        first, last = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
        seconds: FloatArray = (last - first) * (
            self.quadratic_seconds * (last + first) + self.linear_seconds
        )
        return seconds

    def lengths_seconds(self, lengths: Sequence[int]) -> npt.NDArray[np.float64]:
        """`sequence_seconds` of many sequences at once, [num_sequences]."""
        length = np.asarray(lengths, dtype=np.float64)
        return (self.quadratic_seconds * length + self.linear_seconds) * length

    def max_useful_ranks(self, length: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """c_max: how many ranks may share a sequence before its ring's hops show; elementwise.

        At least 1; the sequence's length where communication costs nothing.
        """
        tokens = np.asarray(length, dtype=np.int64)
        if self.communication is None:
            return np.maximum(tokens, 1)
        fewest_tokens = self.communication.hidden_tokens(self.quadratic_seconds)
        useful = np.maximum(tokens // max(fewest_tokens, 1.0), 1)
        return np.asarray(useful, dtype=np.int64)

    def exposed_seconds(self, length: npt.ArrayLike, num_ranks: npt.ArrayLike) -> FloatArray:
        """What each rank of an even cut loses to ring or all-to-all, the cheaper; elementwise."""
        if self.communication is None:
            return np.zeros(np.broadcast_shapes(np.shape(length), np.shape(num_ranks)))
        ring, all_to_all = self._exchange_seconds(self.communication, length, num_ranks)
        cheaper: FloatArray = np.where(all_to_all < ring, all_to_all, ring)
        return cheaper

    def uneven_seconds(self, length: int, shares: Sequence[int]) -> float:
        """What each rank of an uneven cut loses to its ring; the largest share sets the pace."""
        if self.communication is None:
            return 0.0
        mean = length / len(shares)
        return float(
            self.communication.ring_seconds(
                len(shares), block_tokens=max(shares), hop_seconds=self.quadratic_seconds * mean**2
            )
        )

    def prefers_ulysses(
        self, length: npt.ArrayLike, num_ranks: npt.ArrayLike
    ) -> npt.NDArray[np.bool_]:
        """Whether an all-to-all of heads beats the ring for an even cut; elementwise."""
        if self.communication is None:
            return np.zeros(np.broadcast_shapes(np.shape(length), np.shape(num_ranks)), dtype=bool)
        ring, all_to_all = self._exchange_seconds(self.communication, length, num_ranks)
        prefers: npt.NDArray[np.bool_] = all_to_all < ring
        return prefers

    def shared_seconds(self, length: npt.ArrayLike, num_ranks: npt.ArrayLike) -> FloatArray:
        """Seconds of each rank of an evenly cut sequence, without g; elementwise."""
        tokens = np.asarray(length, dtype=np.float64)
        whole = (self.quadratic_seconds * tokens + self.linear_seconds) * tokens
        seconds: FloatArray = whole / np.asarray(num_ranks)
        return seconds + self.exposed_seconds(length, num_ranks)

    def _exchange_seconds(
        self, ring: RingCost, length: npt.ArrayLike, num_ranks: npt.ArrayLike
    ) -> tuple[FloatArray, FloatArray]:
        """By ring and by all-to-all."""
        share = np.asarray(length, dtype=np.float64) / np.asarray(num_ranks)
        by_heads = ring.ulysses_seconds(num_ranks, block_tokens=share)
        return (
            ring.ring_seconds(
                num_ranks, block_tokens=share, hop_seconds=self.quadratic_seconds * share**2
            ),
            # Ranks without a token take no part, and the others need not divide the heads.
            np.where(share < 1.0, np.inf, by_heads),
        )
