"""RMSNorm that works under sequence parallelism without Transformer Engine.

y = x / sqrt(mean(x^2) + eps) * weight, computed in float32 (Zhang and Sennrich 2019, Eq. 4).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.parallel_state import (
    get_data_parallel_group,
    get_tensor_model_parallel_group,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class _RMSNormFunction(torch.autograd.Function):
    """Keeps the input and one float32 per row; the normalised tensor is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        # [..., 1] reciprocal root mean square of each row.
        rrms = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        rrms = rrms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rrms)
        output: Tensor = (x32 * rrms).mul_(weight).to(x.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rrms = ctx.saved_tensors
        normalised = x.float() * rrms
        grad32 = grad_output.float()
        hidden_size = x.shape[-1]
        grad_weight = (grad32 * normalised).view(-1, hidden_size).sum(dim=0)
        grad_scaled = grad32 * weight
        projection = (grad_scaled * normalised).mean(dim=-1, keepdim=True)
        grad_x = grad_scaled.sub_(normalised.mul_(projection)).mul_(rrms)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """RMSNorm over the last dim; its weight is marked for sequence parallelism as megatron expects.

    Args:
        config: megatron's configuration (params_dtype, sequence_parallel).
        hidden_size: width of the last dim.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # Ranks see different tokens then, so megatron sums this gradient over the tensor group.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Asked for by megatron's attention and MLP; the weight is whole on every rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(  # type: ignore[no-any-return]
            state,
            prefix,
            {},
            sharded_offsets,
            tp_group=get_tensor_model_parallel_group(),
            dp_cp_group=get_data_parallel_group(with_context_parallel=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size], any float dtype; same shape and dtype out."""
        if x.is_cuda:
            # One fused kernel each way there.
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNormFunction.apply(x, self.weight, self.eps)  # type: ignore[no-any-return, no-untyped-call]


class ReorderedNorm(nn.Module):
    """Comes before a part of a layer among the bases: normalises what that part gives.

    So x + norm(f(x)) in place of x + f(norm(x)) (OLMo 2, section 3.1).
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.output_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(*args, **kwargs)
        return self.output_layernorm(output), bias
