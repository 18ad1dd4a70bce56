"""SwiGLU feed-forward: linear_fc2(silu(gate) * up), with gate and up from one linear_fc1."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_ext.norm import ReorderedNorm
from moe.swiglu import swiglu


class SwiGLUMLP(MLP):
    """megatron's MLP with our activation where its fused kernel is not compiled."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.config.bias_activation_fusion or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **kwargs)  # type: ignore[no-any-return]
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))  # type: ignore[no-any-return]


class ReorderedNormMLP(ReorderedNorm, SwiGLUMLP):
    """Feed-forward whose output is normalised before the residual sum (OLMo 2, section 3.1)."""
