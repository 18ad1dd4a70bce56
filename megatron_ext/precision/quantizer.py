"""What happens to one operand of a product before it is multiplied: a rule, not yet a tensor.

    x  ->  (Hadamard in groups)  ->  scale of each block  ->  round  ->  codes and scales

`None` in the place of a quantizer leaves the operand as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.precision.block_format import BlockFormat

Rounding = Literal["nearest", "stochastic"]
ScaleRule = Literal["absmax", "quest", "headroom", "eden", "sawb"]
Signs = Literal["none", "fixed", "random"]


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How an operand is stored.

    Attributes:
        hadamard_group: length of the transformed groups along the contracted dim; 1: none.
        signs: of the transform: none, one fixed vector for the run, or new ones each pass.
        scale_rule: see `scales.py`.
        rounds_scale_up: E8M0 scales and float32 scales of powers of two: ceil in place of floor.
        power_of_two_scales: float32 scales become powers of two.
        tries_four: NVFP4: a block may have its largest value at 4 in place of 6, whichever has the
            smaller square error (four over six).
        keeps_mask: remember which values were clipped; their gradient is 0 (QuEST).
    """

    block_format: BlockFormat
    rounding: Rounding = "nearest"
    scale_rule: ScaleRule = "absmax"
    hadamard_group: int = 1
    signs: Signs = "none"
    rounds_scale_up: bool = False
    power_of_two_scales: bool = False
    tries_four: bool = False
    keeps_mask: bool = False

    @property
    def group(self) -> int:
        """What the contracted dim must be a multiple of."""
        smallest = 2 if self.block_format.is_packed else 1
        return max(self.hadamard_group, self.block_format.block_columns or smallest)

    @property
    def has_tensor_scale(self) -> bool:
        """Whether a float32 scale of the tensor is stored."""
        return self.block_format.has_tensor_scale or self.scale_rule == "headroom"

    @property
    def needs_tensor_amax(self) -> bool:
        """Whether scales follow from the largest magnitude of the whole tensor."""
        block_format = self.block_format
        is_whole = block_format.block_rows is None and block_format.block_columns is None
        return is_whole or (block_format.has_tensor_scale and self.scale_rule != "headroom")
