"""Noise on logits, for routers that should try what they would not choose.

Noisy top-k (Shazeer et al., 1701.06538, Eq. 4), with a learned width for each token and expert:

    h_i = l_i + n_i softplus((W_noise x)_i),        n_i standard normal

Stochastic warm-up (Ling, 2503.05139), from any expert for any token to the router's own choice over
the first W steps; mu and sigma are running figures of the logits:

    h_i = a l_i + (1 - a) (mu + sigma n_i),         a = min(step / W, 1)

The n_i belong to the token (`moe.gate.random_numbers`), so no cut of the batch changes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.gate.random_numbers import normal

# Steps over which the running figures forget.
_MOMENTUM = 0.9


def noisy_logits(logits: Tensor, widths: Tensor, *, keys: Tensor) -> Tensor:
    """Shazeer's noise.

    Args:
        logits, widths: float32 [num_tokens, num_experts], W x and W_noise x.
        keys: int64 [num_tokens] (`token_keys`).
    """
    return logits + normal(keys, logits.shape[-1]) * torch.nn.functional.softplus(widths)


def warmup_logits(logits: Tensor, *, share: float, statistics: Tensor, keys: Tensor) -> Tensor:
    """Ling's mixture of logits and noise.

    Args:
        share: a, what is the router's own.
        statistics: float32 [2], mu and sigma.
    """
    noise = statistics[0] + statistics[1] * normal(keys, logits.shape[-1])
    return share * logits + (1.0 - share) * noise


@dataclass(frozen=True, slots=True)
class LogitSums:
    """What the logits of a step leave behind: sums, so that parts of a batch add up.

    Attributes:
        sums: float64 [3], how many logits, their sum, the sum of their squares.
    """

    sums: Tensor

    @staticmethod
    def of(logits: Tensor) -> LogitSums:
        wide = logits.detach().double()
        count = wide.new_tensor(float(wide.numel()))
        return LogitSums(torch.stack([count, wide.sum(), wide.square().sum()]))

    def into(self, statistics: Tensor) -> Tensor:
        """The running mean and deviation after a step with these logits, float32 [2]."""
        count, total, squares = self.sums.unbind()
        mean = total / count.clamp_min(1.0)
        deviation = (squares / count.clamp_min(1.0) - mean.square()).clamp_min(0.0).sqrt()
        found = torch.stack([mean, deviation]).float()
        mixed = _MOMENTUM * statistics + (1.0 - _MOMENTUM) * found
        return torch.where(count > 0, mixed, statistics)
