"""The gradient of a weight in megatron's float32 buffer, where micro-batches are added up.

main_grad += dy^T x        by the product itself where it can, never rounded on the way
"""

from __future__ import annotations

import torch
from torch import Tensor


def float32_main_grad(weight: Tensor) -> Tensor | None:
    """megatron's buffer of a weight's gradient, where products can be added to one."""
    main_grad = _main_grad(weight)
    if main_grad is None or main_grad.dtype != torch.float32 or not main_grad.is_contiguous():
        return None
    return main_grad


def _main_grad(weight: Tensor) -> Tensor | None:
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    return main_grad


def accumulated(weight: Tensor, grad: Tensor) -> Tensor:
    """Add a float32 gradient to megatron's buffer; without one: the gradient in weight's dtype."""
    main_grad = _main_grad(weight)
    if main_grad is None:
        return grad.to(weight.dtype)
    main_grad.add_(grad)
    return placeholder_grad(weight)


def placeholder_grad(weight: Tensor) -> Tensor:
    """What autograd gets for a gradient that stands in megatron's buffer; it counts for nothing."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # Hooks that start reductions wait for a gradient of some kind.
    return torch.zeros((), dtype=weight.dtype, device=weight.device).expand_as(weight)
