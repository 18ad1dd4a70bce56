"""Linear + cross entropy in chunks of tokens, so that the logits of a long row never exist at once.

    loss = sum_t token_weight_t * (cross_entropy_t + z * lse_t^2)

For each chunk: logits = hidden weight^T, their loss, the logits' gradient in their place, and from
it both gradients,

    grad_hidden = grad_logits weight        grad_weight += grad_logits^T hidden

So the forward pass computes everything, each logit once: three matrix products in all, as with
stored logits, where recomputing the logits in the backward pass would cost a fourth. Kept until
backward are the two gradients, of the sizes of hidden and weight; in 1F1B the backward pass of the
last stage follows at once.

The price: the factors of the tokens must be known in forward. They are an argument
(`token_weights`), the loss is their weighted sum, and what comes from behind in backward is one
number that scales both gradients. A gradient that differs from token to token is a token weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.softmax_cross_entropy import Kernel, choose_kernel, softmax_cross_entropy_

# Logits that exist at once. On a CPU few enough to stay near the cache, yet each chunk adds a whole
# weight gradient; on a GPU products of some thousand rows reach full speed.
_MAX_CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
_MAX_CHUNK_TOKENS = {"cpu": 1024, "cuda": 1 << 20}
# Chunks are multiples of it: tiles of the matrix products.
_CHUNK_MULTIPLE = 128


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup,
    token_weights: Tensor | None = None,
    z_loss_coeff: float = 0.0,
    kernel: Kernel | None = None,
    max_chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the losses of all tokens, and the cross entropy of each.

    The vocabulary may be spread over the ranks of `group`. Then the gradient of `hidden` is this
    rank's part; whoever handed out `hidden` sums it (see `output_layer`).

    Args:
        hidden: [num_tokens, hidden_size], the same on every rank of the group.
        weight: [vocab_size / tensor_size, hidden_size], this rank's rows; dtype of hidden.
        labels: int64 [num_tokens], global ids.
        group: tensor-parallel group; every rank of it calls this together.
        token_weights: float32 [num_tokens], factors of the losses, without gradient; None: all 1.
        z_loss_coeff: weight of lse^2 (PaLM, arXiv 2204.02311, section 5).
        kernel: None takes Triton on CUDA and ROCm, else torch.
        max_chunk_tokens: tokens whose logits may exist at once; None: as many as suit the device.

    Returns:
        (loss, float32 []; cross entropy without z-loss and gradient, float32 [num_tokens]).
    """
    if token_weights is None:
        token_weights = torch.ones(len(labels), dtype=torch.float32, device=labels.device)
    options = _Options(
        group=group,
        z_loss_coeff=z_loss_coeff,
        kernel=kernel or choose_kernel(hidden.device.type),
        max_chunk_tokens=max_chunk_tokens or _max_chunk_tokens(weight),
        has_backward=torch.is_grad_enabled(),
    )
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, options)  # type: ignore[no-any-return, no-untyped-call]


def _max_chunk_tokens(weight: Tensor) -> int:
    device = weight.device.type
    num_tokens = _MAX_CHUNK_BYTES[device] // (weight.shape[0] * weight.element_size())
    num_tokens = min(num_tokens, _MAX_CHUNK_TOKENS[device])
    return max(1, num_tokens // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE


@dataclass(frozen=True, slots=True)
class _Options:
    group: dist.ProcessGroup
    z_loss_coeff: float
    kernel: Kernel
    max_chunk_tokens: int
    has_backward: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = (
            options.has_backward and needed for needed in ctx.needs_input_grad[:2]
        )
        chunks = _chunks(len(hidden), options.max_chunk_tokens)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = _WeightGradient(weight, num_chunks=len(chunks)) if needs_weight else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        cross_entropies = torch.empty_like(losses)
        # One memory for the logits of all chunks.
        buffer = hidden.new_empty(chunks[0].stop if chunks else 0, weight.shape[0])
        for rows in chunks:
            logits = buffer[: rows.stop - rows.start]
            torch.mm(hidden[rows], weight.t(), out=logits)
            losses[rows], cross_entropies[rows] = softmax_cross_entropy_(
                logits,
                labels[rows],
                token_weights=token_weights[rows],
                group=options.group,
                z_loss_coeff=options.z_loss_coeff,
                kernel=options.kernel,
                with_gradient=needs_hidden or needs_weight,
            )
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.add(logits, hidden[rows])
        # Not `save_for_backward`: backward scales these in place, and no hook may carry them away.
        ctx.gradients = grad_hidden, grad_weight
        ctx.mark_non_differentiable(cross_entropies)
        return (losses * token_weights).sum(), cross_entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy keeps no inputs: one backward pass, not two")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        # megatron's schedules hand in one number as a tensor of any shape.
        factor = grad_loss.reshape(())
        if grad_hidden is not None:
            grad_hidden.mul_(factor)
        scaled = grad_weight.scaled(factor) if grad_weight is not None else None
        return grad_hidden, scaled, None, None, None


def _chunks(num_tokens: int, max_chunk_tokens: int) -> list[slice]:
    """Chunks of equal size but for the last; the same on all ranks that have the same sizes."""
    if num_tokens == 0:
        return []
    num_chunks = -(-num_tokens // max_chunk_tokens)
    size = -(-num_tokens // num_chunks)
    size = min(max_chunk_tokens, -(-size // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE)
    return [slice(i, min(i + size, num_tokens)) for i in range(0, num_tokens, size)]


class _WeightGradient:
    """grad_logits^T hidden, summed over chunks in float32."""

    def __init__(self, weight: Tensor, *, num_chunks: int) -> None:
        self.weight = weight
        # One product is a float32 sum in itself, rounded once.
        self.dtype = weight.dtype if num_chunks <= 1 else torch.float32
        self.total: Tensor | None = None

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        grad_logits = grad_logits.t()
        if hidden.dtype == self.dtype:
            if self.total is None:
                self.total = torch.mm(grad_logits, hidden)
            else:
                self.total.addmm_(grad_logits, hidden)
        elif not hidden.is_cuda:
            # CPU products of bfloat16 are rounded to it, each chunk once.
            product = torch.mm(grad_logits, hidden)
            self.total = product.float() if self.total is None else self.total.add_(product)
        elif self.total is None:
            self.total = torch.mm(grad_logits, hidden, out_dtype=self.dtype)
        else:
            torch.addmm(self.total, grad_logits, hidden, out_dtype=self.dtype, out=self.total)

    def scaled(self, factor: Tensor) -> Tensor:
        """The sum times a number, in the weight's dtype; ends this object's life."""
        if self.total is None:
            return torch.zeros_like(self.weight)
        if self.total.dtype == self.weight.dtype:
            return self.total.mul_(factor)
        return torch.mul(self.total, factor, out=torch.empty_like(self.weight))
