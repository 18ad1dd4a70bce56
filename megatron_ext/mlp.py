"""SwiGLU feed-forward: linear_fc2(silu(gate) * up), with gate and up from one linear_fc1."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.norm import RMSNorm


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
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grad_output, torch.nn.functional.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_output * up, gate, grad_input=grad_gate)
        return grad


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [..., 2 * ffn_size], gate first; returns [..., ffn_size]."""
    return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return, no-untyped-call]


class SwiGLUMLP(MLP):
    """megatron's MLP with the activation above where its fused kernel is not compiled."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.config.bias_activation_fusion or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **kwargs)  # type: ignore[no-any-return]
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))  # type: ignore[no-any-return]


class ReorderedNormMLP(SwiGLUMLP):
    """Feed-forward whose output is normalised before the residual sum (OLMo 2, section 3.1)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.output_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(*args, **kwargs)
        return self.output_layernorm(output), bias
