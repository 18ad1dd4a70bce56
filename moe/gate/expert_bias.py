"""Balance without a loss: a bias for each expert that only the choice sees.

    chosen = top-k of s_i + b_i,      weight_i from s_i alone
    after a step:  b_i += rate * sign(mean_j c_j - c_i)

with c the choices of the whole global batch (DeepSeek-V3, 2412.19437, section 2.1.2; Wang et al.,
2408.15664). The bias has no gradient; whoever has too few tokens is lifted a little.
"""

from __future__ import annotations

from torch import Tensor


def updated_bias(bias: Tensor, counts: Tensor, *, rate: float) -> Tensor:
    """The bias for the next step, in the dtype of `bias`.

    Args:
        bias: float32 [..., num_experts].
        counts: int64 [..., num_experts], choices of each expert in the whole global batch.
    """
    # mean - c without a division, so that no rounding takes a side.
    lack = counts.sum(dim=-1, keepdim=True) - counts * counts.shape[-1]
    return bias + rate * lack.sign().to(bias.dtype)
