"""How evenly experts are loaded, and how much they keep to domains: functions of counts.

With c_i the choices that went to expert i of E, and q_i = c_i / sum_j c_j:

    max over mean       E max_i q_i                      1 is even
    entropy             -sum_i q_i ln q_i / ln E         1 is even, 0 is one expert for all
    dropped share       1 - sum_i c_i / wanted choices

With q_d the shares in domain d of D, and m = mean_d q_d the mixture of all domains in equal parts:

    specialisation      mean_d (1/2) sum_i |q_di - m_i|  0 if all domains choose alike,
                                                         1 - 1/D if no two share an expert
    top share           mean_d sum of the k largest q_di k/E if even, 1 if a domain has k experts

The specialisation is the mean total variation between a domain and the mixture: the share of a
domain's choices that would have to move for it to be routed like all. It does not depend on how
much text of each domain was seen. That an expert is chosen more is no specialisation (all domains
may choose it); that is what the top share tells: "Demons in the Detail" (2501.11873) looks at both,
as the frequencies of the most chosen experts in each domain.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expert_shares(counts: Tensor) -> Tensor:
    """Shares of the choices, float64 [..., num_experts]; all 0 where nothing was chosen."""
    counts = counts.double()
    return counts / counts.sum(dim=-1, keepdim=True).clamp_min(1)


def max_over_mean(counts: Tensor) -> Tensor:
    """Load of the fullest expert over the mean load, [...] of counts [..., num_experts]."""
    return expert_shares(counts).amax(dim=-1) * counts.shape[-1]


def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the load over its largest value ln E, [...]; 1 with a single expert."""
    shares = expert_shares(counts)
    if counts.shape[-1] == 1:
        return torch.ones_like(shares[..., 0])
    return -torch.xlogy(shares, shares).sum(dim=-1) / math.log(counts.shape[-1])


def dropped_share(counts: Tensor, demand: Tensor) -> Tensor:
    """Part of the choices that no expert computed, [...]; 0 where there was none.

    Args:
        counts: [..., num_experts], choices that were computed.
        demand: [..., num_experts], all choices.
    """
    wanted = demand.double().sum(dim=-1)
    return (wanted - counts.double().sum(dim=-1)) / wanted.clamp_min(1)


def specialisation(counts: Tensor) -> Tensor:
    """Mean total variation between the domains' choices and their mixture, [...].

    Args:
        counts: [..., num_domains, num_experts]; domains without a choice are left out.
    """
    shares, is_seen = _of_seen_domains(counts)
    num_seen = is_seen.sum(dim=-1).clamp_min(1)
    mixture = shares.sum(dim=-2) / num_seen[..., None]
    distances = (shares - mixture[..., None, :]).abs().sum(dim=-1) / 2
    return (distances * is_seen).sum(dim=-1) / num_seen


def top_share(counts: Tensor, *, topk: int) -> Tensor:
    """Mean over domains of the choices that fall to the domain's `topk` most chosen experts, [...].

    Args:
        counts: [..., num_domains, num_experts]; domains without a choice are left out.
    """
    shares, is_seen = _of_seen_domains(counts)
    largest = shares.topk(topk, dim=-1).values.sum(dim=-1)
    return largest.sum(dim=-1) / is_seen.sum(dim=-1).clamp_min(1)


def _of_seen_domains(counts: Tensor) -> tuple[Tensor, Tensor]:
    return expert_shares(counts), counts.sum(dim=-1) > 0
