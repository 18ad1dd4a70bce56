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

from parallel.plan.flops import ModelShape
from parallel.plan.records import MicroBatch

# Backward over forward. Linear layers: gradients of input and of weight. Flash attention: five
# products in place of two, since the scores are computed again.
_LINEAR_BACKWARD = 2.0
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds that one rank spends, forward and backward."""

    quadratic_seconds: float
    """a: per square of a sequence's tokens."""
    linear_seconds: float
    """b: per token."""
    fixed_seconds: float
    """g: per micro-batch."""

    @classmethod
    def from_model(
        cls, shape: ModelShape, *, flops_per_second: float, fixed_seconds: float = 0.0
    ) -> "CostModel":
        """Estimate from the layers (and output layer) that one rank holds.

        flops_per_second is what the rank attains, not its peak. Attention over s tokens has
        s (s + 1) / 2 pairs; with F forward FLOPs per pair (4 num_attention_heads kv_channels
        num_layers) and backward 2.5 times forward it costs 3.5 F (s^2 + s) / 2, so

            a = 3.5 F / 2 / flops_per_second
            b = (3 * 2 N_mat) / flops_per_second + a

        with N_mat from `flops.ModelShape` and backward twice forward in linear layers.
        """
        attention = (1 + _ATTENTION_BACKWARD) * shape.forward_flops_per_pair / 2
        linear = (1 + _LINEAR_BACKWARD) * shape.forward_flops_per_token
        return cls(
            quadratic_seconds=attention / flops_per_second,
            linear_seconds=(linear + attention) / flops_per_second,
            fixed_seconds=fixed_seconds,
        )

    def sequence_seconds(self, length: int) -> float:
        """a s^2 + b s of a whole sequence."""
        return (self.quadratic_seconds * length + self.linear_seconds) * length

    def piece_seconds(self, start: int, end: int) -> float:
        """Tokens start..end of a sequence, which see all tokens before them.

        The pieces of a sequence add up to the sequence.
        """
        return self.sequence_seconds(end) - self.sequence_seconds(start)

    def micro_batch_seconds(self, micro_batch: MicroBatch) -> float:
        """All pieces and g; an empty micro-batch still costs g."""
        pieces = sum(self.piece_seconds(piece.start, piece.end) for piece in micro_batch.pieces)
        return pieces + self.fixed_seconds

    def lengths_seconds(self, lengths: Sequence[int]) -> npt.NDArray[np.float64]:
        """`sequence_seconds` of many sequences at once, [num_sequences]."""
        length = np.asarray(lengths, dtype=np.float64)
        return (self.quadratic_seconds * length + self.linear_seconds) * length
