"""A loss that arises inside a layer, added to the gradient without going through the output.

A layer returns hidden states, so a term like the router's z-loss has no way to the end of the
model (which may be on another pipeline stage). It is attached to a tensor that the layer uses
anyway: forward that tensor is unchanged, backward the term gets gradient 1. The loss of a
micro-batch is a sum over tokens with gradient 1 too, and the sum of all is divided once by the
global batch's tokens; so a term must be a sum over this rank's tokens times its coefficient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return grad_output, torch.ones_like(ctx.like)


def attach_loss(carrier: Tensor, loss: Tensor) -> Tensor:
    """`carrier` as it is; when a gradient comes back through it, `loss` is differentiated too.

    Args:
        carrier: any tensor on the way to the loss.
        loss: scalar, a sum over tokens.
    """
    return _AttachLoss.apply(carrier, loss)  # type: ignore[no-any-return, no-untyped-call]
