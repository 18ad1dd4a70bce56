"""Cross entropy over a vocabulary that may be spread over the tensor-parallel ranks.

loss_t = lse_t - logit_t[label_t] (+ z * lse_t^2), with lse the log-sum-exp over the whole
vocabulary. The logits and their gradient stay in the logits' own dtype; float32 copies exist for
one block of rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Float32 of one block of rows: what stays in a CPU's cache; on a GPU enough to fill the device.
_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}


def _blocks(logits: Tensor) -> list[slice]:
    num_rows, vocab_size = logits.shape
    rows = max(1, _BLOCK_BYTES[logits.device.type] // (4 * vocab_size))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup, z_loss_coeff: float
    ) -> tuple[Tensor, Tensor]:
        num_rows, vocab_size = logits.shape
        tensor_size = group.size()
        local = labels - group.rank() * vocab_size
        is_local = (local >= 0) & (local < vocab_size)
        local = local.clamp(0, vocab_size - 1)

        target = logits.gather(1, local[:, None]).squeeze(1).float() * is_local
        lse = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        for rows in _blocks(logits):
            torch.logsumexp(logits[rows].float(), dim=1, out=lse[rows])
        if tensor_size > 1:
            lses = torch.empty(tensor_size, num_rows, dtype=torch.float32, device=logits.device)
            dist.all_gather_into_tensor(lses.view(-1), lse, group=group)
            lse = torch.logsumexp(lses, dim=0)
            dist.all_reduce(target, group=group)
        ctx.save_for_backward(logits, lse, local, is_local)
        ctx.z_loss_coeff = z_loss_coeff
        cross_entropy = lse - target
        # Two tensors even where they are equal: one is differentiated, the other is not.
        loss = cross_entropy + z_loss_coeff * lse.square()
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        logits, lse, local, is_local = ctx.saved_tensors
        scale = grad_loss.float()
        # d loss / d logit_j = p_j * (1 + 2 z lse) - [j == label]
        softmax_scale = scale * (1.0 + 2.0 * ctx.z_loss_coeff * lse) if ctx.z_loss_coeff else scale
        grad = torch.empty_like(logits)
        for rows in _blocks(logits):
            block = (
                logits[rows].float().sub_(lse[rows, None]).exp_().mul_(softmax_scale[rows, None])
            )
            block.scatter_add_(1, local[rows, None], -(scale[rows] * is_local[rows])[:, None])
            grad[rows] = block
        return grad, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, *, group: dist.ProcessGroup, z_loss_coeff: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Loss of every token.

    Args:
        logits: [num_tokens, vocab_size / tensor_size], this rank's columns.
        labels: int64 [num_tokens], global ids.
        group: tensor-parallel group; every rank of it calls this together.
        z_loss_coeff: weight of lse^2 (PaLM, section 5).

    Returns:
        (loss with z-loss, cross entropy alone without gradient), both float32 [num_tokens].
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, group, z_loss_coeff)  # type: ignore[no-any-return, no-untyped-call]
