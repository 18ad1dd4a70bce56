"""Softmax cross entropy of a block of logits, whose memory then holds their gradient.

With m the row's maximum, S = sum_j exp(logit_j - m) over the whole vocabulary and lse = m + log S:

    cross_entropy = (m - logit[label]) + log S
    d loss / d logit_j = token_weight * ((1 + 2 z lse) exp(logit_j - m) / S - [j == label])

Logits may be bfloat16; m, S and everything per row are float32, and so is each step within a row.
Where the vocabulary is spread over ranks, each finds (m, S, logit[label]) of its own columns, one
gather of these three numbers a row makes them whole, and the gradient needs nothing more. On CUDA
and ROCm two Triton kernels do it: one online pass, one in-place pass (ByteScale's fused softmax
cross entropy, arXiv 2502.21231, figure 16).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.device import has_triton

Kernel = Literal["torch", "triton"]

_log = logging.getLogger("megatron_ext.cross_entropy")

# Float32 of the rows that the torch version computes at once: stays in a CPU core's own cache. On
# a GPU, where Triton is the rule, enough to fill the device.
_BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}


@dataclass(frozen=True, slots=True)
class RowSums:
    """What a softmax and its loss need of each row; float32 [num_rows] each."""

    maximum: Tensor
    exp_sum: Tensor
    """Sum of exp(logit - maximum)."""
    target: Tensor
    """The label's logit; 0 where other ranks have it."""

    def over_ranks(self, group: dist.ProcessGroup) -> RowSums:
        """The same over the vocabularies of all ranks of the group, which call this together."""
        if group.size() == 1:
            return self
        own = torch.stack((self.maximum, self.exp_sum, self.target))
        all_sums = own.new_empty(group.size(), *own.shape)
        dist.all_gather_into_tensor(all_sums.view(-1), own.view(-1), group=group)
        maxima, exp_sums, targets = all_sums.unbind(dim=1)
        maximum = maxima.amax(dim=0)
        return RowSums(
            maximum, (exp_sums * torch.exp(maxima - maximum)).sum(dim=0), targets.sum(dim=0)
        )


@cache
def choose_kernel(device_type: str) -> Kernel:
    """Triton on CUDA and ROCm where it is installed; says once what it chose."""
    kernel: Kernel = "torch"
    reason = ""
    if device_type == "cuda":
        if has_triton():
            kernel = "triton"
        else:
            reason = " (triton is not installed)"
    _log.info("softmax cross entropy on %s: %s%s", device_type, kernel, reason)
    return kernel


def softmax_cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor,
    group: dist.ProcessGroup,
    z_loss_coeff: float,
    kernel: Kernel,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of every row; `logits` become their gradient, or something meaningless without one.

    Args:
        logits: [num_rows, vocab_size / tensor_size], this rank's columns; contiguous.
        labels: int64 [num_rows], global ids.
        token_weights: float32 [num_rows], factors of the gradient's rows.
        group: tensor-parallel group; every rank of it calls this together.

    Returns:
        (loss with z-loss, cross entropy alone), both float32 [num_rows], not weighted.
    """
    function = _by_triton_ if kernel == "triton" else _by_torch_
    # Ids of other ranks' columns are below 0 or beyond the last.
    labels = labels - group.rank() * logits.shape[1]
    if kernel == "triton" or group.size() > 1:
        return function(logits, labels, token_weights, group, z_loss_coeff, with_gradient)
    # Rows that stay in cache from the first pass to the last.
    num_rows = max(1, _BLOCK_BYTES[logits.device.type] // (4 * logits.shape[1]))
    blocks = [
        function(*block, group, z_loss_coeff, with_gradient)
        for block in zip(
            torch.split(logits, num_rows),
            torch.split(labels, num_rows),
            torch.split(token_weights, num_rows),
            strict=True,
        )
    ]
    losses, cross_entropies = zip(*blocks, strict=True)
    return torch.cat(losses), torch.cat(cross_entropies)


def _by_torch_(
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    group: dist.ProcessGroup,
    z_loss_coeff: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    is_own = (labels >= 0) & (labels < logits.shape[1])
    column = labels.clamp(0, logits.shape[1] - 1)[:, None]
    target = logits.gather(1, column).squeeze(1).float() * is_own
    # The same memory where the logits are float32.
    wide = logits.float()
    maximum = wide.amax(dim=1)
    wide.sub_(maximum[:, None]).exp_()
    whole = RowSums(maximum, wide.sum(dim=1), target).over_ranks(group)
    loss, cross_entropy, softmax_weights = _losses(whole, token_weights, z_loss_coeff)
    if with_gradient:
        scale = softmax_weights / whole.exp_sum * torch.exp(maximum - whole.maximum)
        wide.mul_(scale[:, None])
        wide.scatter_add_(1, column, -(token_weights * is_own)[:, None])
        if wide is not logits:
            logits.copy_(wide)
    return loss, cross_entropy


def _by_triton_(
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    group: dist.ProcessGroup,
    z_loss_coeff: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    from megatron_ext.softmax_cross_entropy_triton import gradient_, row_sums

    whole = RowSums(*row_sums(logits, labels)).over_ranks(group)
    loss, cross_entropy, softmax_weights = _losses(whole, token_weights, z_loss_coeff)
    if with_gradient:
        gradient_(
            logits,
            labels,
            maximum=whole.maximum,
            scale=softmax_weights / whole.exp_sum,
            token_weights=token_weights,
        )
    return loss, cross_entropy


def _losses(
    whole: RowSums, token_weights: Tensor, z_loss_coeff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross entropy, factor of softmax in the gradient) of every row."""
    log_sum = whole.exp_sum.log()
    # In this order the maximum, however large, costs no digits.
    cross_entropy = (whole.maximum - whole.target) + log_sum
    if not z_loss_coeff:
        return cross_entropy, cross_entropy, token_weights
    lse = whole.maximum + log_sum
    loss = cross_entropy + z_loss_coeff * lse.square()
    return loss, cross_entropy, token_weights * (1.0 + 2.0 * z_loss_coeff * lse)
