"""What is asked for when a matrix and its transpose are stored together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_ext.precision.quantizer import Quantizer


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """A copy to be made: how, and with which random numbers."""

    quantizer: Quantizer
    seed: int = 0
    signs: Tensor | None = None
