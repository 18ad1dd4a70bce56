"""Small floats, as data: sign, exponent, mantissa, and what the top codes mean.

| format | s, e, m | largest | special |
|---|---|---|---|
| E4M3 | 1, 4, 3 | 448 | NaN at the top, no infinities |
| E5M2 | 1, 5, 2 | 57344 | as IEEE |
| E2M1 | 1, 2, 1 | 6 | none |

Source: OCP 8-bit Floating Point Specification 1.0, OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ElementFormat:
    """A small float: sign, `exponent_bits`, `mantissa_bits`.

    Attributes:
        max_value: largest finite value.
        min_exponent: of the smallest normal value; subnormals have its step.
        infinity_code, nan_code: codes without sign; None where the format has none.
        native: name of torch's dtype of the same bits; None: two codes share a byte.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max_value: float
    infinity_code: int | None
    nan_code: int | None
    native: str | None

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Of the largest value: floor(log2(max_value))."""
        return math.frexp(self.max_value)[1] - 1

    @property
    def min_step(self) -> float:
        """Between subnormals."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)


E4M3 = ElementFormat("e4m3", 4, 3, 448.0, None, 0x7F, "float8_e4m3fn")
E5M2 = ElementFormat("e5m2", 5, 2, 57344.0, 0x7C, 0x7E, "float8_e5m2")
E2M1 = ElementFormat("e2m1", 2, 1, 6.0, None, None, None)
# Only to compare with (`luq.py`): 0, 0.5, ..., 3.5, integers of 4 bits; and 0, 2^-2, ..., 2^4.
E1M2 = ElementFormat("e1m2", 1, 2, 3.5, None, None, None)
E3M0 = ElementFormat("e3m0", 3, 0, 16.0, None, None, None)
