"""The definition of linear + cross entropy, written for reading: all logits at once, in float32.

    logits = hidden weight^T,   lse_t = log sum_j exp(logits_tj)
    cross_entropy_t = lse_t - logits_t[label_t]
    loss = sum_t token_weight_t * (cross_entropy_t + z * lse_t^2)

(z-loss: PaLM, arXiv 2204.02311, section 5.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    z_loss_coeff: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `linear_cross_entropy`, but with the whole vocabulary on one rank.

    In float32; float64 stays. Autograd gives the gradients.
    """
    precision = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(precision) @ weight.to(precision).t()
    return reference_cross_entropy(
        logits, labels, token_weights=token_weights, z_loss_coeff=z_loss_coeff
    )


def reference_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    z_loss_coeff: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same from logits [num_tokens, vocab_size] in float32 or float64."""
    cross_entropy = -torch.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
    loss = cross_entropy + z_loss_coeff * torch.logsumexp(logits, dim=1).square()
    if token_weights is not None:
        loss = loss * token_weights
    return loss.sum(), cross_entropy.detach()
