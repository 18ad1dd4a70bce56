"""silu(gate) * up, the activation between the two linear maps of a feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    """Keeps only its input; silu(gate) is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(gate_up, grad_output)


def swiglu_backward(gate_up: Tensor, grad_output: Tensor) -> Tensor:
    """The gradient of `gate_up`, both as in `swiglu`; no autograd."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad = torch.empty_like(gate_up)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    torch.mul(grad_output, torch.nn.functional.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_output * up, gate, grad_input=grad_gate)
    return grad


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [..., 2 * ffn_size], gate first; returns [..., ffn_size]."""
    return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return, no-untyped-call]
