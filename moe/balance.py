"""Losses that keep the experts evenly loaded.

With f_i the share of a batch's choices that fell on expert i of E (they sum to 1), p_ti the gate's
probability of expert i for token t, and P_i its mean over the batch's T tokens:

    LBL = E sum_i f_i P_i                               1 where all is even (Switch, 2101.03961)

f counts choices and has no gradient, so the loss is linear in the probabilities; and because the
probabilities of a token sum to 1,

    T (LBL - 1) = sum_t sum_i w_i p_ti,   w_i = E f_i - 1      the excess load of expert i

which has the same gradient, and keeps its digits where the load is nearly even and E f_i nearly 1.
Everything else is a choice of w: which batch f is taken over (the tokens of one micro-batch, of one
document, of the whole global batch), and, for balance between devices, its mean over the experts of
a device (DeepSeekMoE, 2401.06066, Eq. 15-17):

    sum over devices d of f'_d P'_d,   f'_d = mean of E f_i on d,  P'_d = sum of P_i on d
        = sum_i w'_i P_i + 1,          w'_i = f'_d - 1 of the device that has expert i

Losses here are sums over tokens; they are divided once by the global batch's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def excess_load(counts: Tensor) -> Tensor:
    """w_i = E f_i - 1, float32 [..., num_experts]; all 0 where nothing was chosen.

    Args:
        counts: [..., num_experts], choices of each expert.
    """
    # In float64 counts are exact, so that w depends on nothing but their values.
    exact = counts.double()
    total = exact.sum(dim=-1, keepdim=True)
    # Rounded up to 1, an empty batch would give -1.
    excess = exact * counts.shape[-1] / total.clamp_min(1) - (total > 0).double()
    return excess.float()


def device_excess(excess: Tensor, *, num_groups: int) -> Tensor:
    """w'_i, the mean of w over the experts that share a device with i.

    Args:
        excess: [..., num_experts].
        num_groups: devices, with equally many consecutive experts each.

    Raises:
        ValueError: the experts cannot be divided so.
    """
    num_experts = excess.shape[-1]
    if num_experts % num_groups:
        raise ValueError(f"{num_experts} experts cannot be divided into {num_groups} groups")
    grouped = excess.reshape(*excess.shape[:-1], num_groups, num_experts // num_groups)
    return grouped.mean(dim=-1, keepdim=True).expand_as(grouped).reshape(excess.shape)


def balance_loss(probabilities: Tensor, excess: Tensor) -> Tensor:
    """T (LBL - 1) = sum_t sum_i w_i p_ti, scalar; differentiable in the probabilities.

    Args:
        probabilities: float32 [num_tokens, num_experts], each row sums to 1.
        excess: [num_experts].
    """
    return probabilities.sum(dim=0) @ excess.to(probabilities.dtype)


def sequence_balance_loss(
    probabilities: Tensor, experts: Tensor, sequences: Tensor, *, num_sequences: int
) -> Tensor:
    """sum_s T_s (LBL_s - 1), where the tokens of each sequence s are a batch of their own; scalar.

    DeepSeek-V3 (2412.19437, Eq. 17-20) has the mean over sequences; here a token counts like any
    other, so that it does not matter how long its sequence is.

    Args:
        probabilities: float32 [num_tokens, num_experts], each row sums to 1.
        experts: int64 [num_tokens, topk]; the number num_experts is nobody and does not count.
        sequences: int64 [num_tokens], the sequence of each token, from 0.
        num_sequences: some may have no token.
    """
    num_experts = probabilities.shape[-1]
    places = sequences[:, None] * (num_experts + 1) + experts
    counts = places.new_zeros(num_sequences * (num_experts + 1))
    counts.scatter_add_(0, places.reshape(-1), torch.ones_like(places).reshape(-1))
    excess = excess_load(counts.view(num_sequences, -1)[:, :num_experts])
    return (probabilities * excess.to(probabilities.dtype)[sequences]).sum()
