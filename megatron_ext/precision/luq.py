"""LUQ, four-bit training before block scales: here to be compared with.

    forward    x, w: integers -7 .. 7 and one scale for the tensor, rounded to the nearest;
               what is clipped follows from two moments (SAWB)
    backward   dy: powers of two and 0, one scale for the tensor, rounded at random; x, w as above

    dy ~= max |dy| / 2^6 * {0, 1, 2, 4, ..., 64}

Rounding at random between neighbouring powers of two, and between 0 and the smallest, keeps the
mean: "underflow" is stochastic too. An integer is a float of one exponent bit, a power of two one
of no mantissa bit, so nothing but formats is new.

Source: Chmiel et al., arXiv 2112.10769, without its averaging over samples and its phase in high
precision at the end. SAWB: Choi et al., arXiv 1807.06964, coefficients of 4 bits.
"""

from __future__ import annotations

from megatron_ext.precision.block_format import INT4_TENSOR, LOG4_TENSOR
from megatron_ext.precision.linear_recipe import LinearRecipe
from megatron_ext.precision.quantizer import Quantizer


def luq_recipe() -> LinearRecipe:
    """Recipe `luq`."""
    plain = Quantizer(INT4_TENSOR, scale_rule="sawb")
    grad = Quantizer(LOG4_TENSOR, rounding="stochastic")
    return LinearRecipe("luq", plain, plain, grad, plain, grad, plain)
