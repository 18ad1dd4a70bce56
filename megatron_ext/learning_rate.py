"""The learning rate of a step: a pure function of the step number, so nothing of it needs saving.

With w warm-up steps, end e and progress p = (step - w) / (e - w) in [0, 1]:

    warm-up    lr * (step + 1) / (w + 1)
    cosine     min + (lr - min) * (1 + cos(pi p)) / 2
    linear     lr + (min - lr) * p                      (linear to zero with min_lr: 0)
    wsd        lr until e - d, then down to min over d steps (MiniCPM, section 4.2)
    infinite   cosine from lr to constant_lr over c steps, constant, then down to min over the
               last d steps (Ibrahim et al. 2024, section 3.3)

The last decay of wsd and infinite may be linear, cosine, exponential or 1 - sqrt.
"""

from __future__ import annotations

import math

from megatron_ext.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, *, train_iters: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0."""
    warmup = optim.lr_warmup_iters
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    end = optim.decay_end(train_iters)
    if optim.lr_decay_style == "constant":
        return optim.lr
    if optim.lr_decay_style in ("cosine", "linear"):
        progress = min(1.0, (step - warmup) / max(1, end - warmup))
        return _between(optim.lr, optim.min_lr, progress, optim.lr_decay_style)
    return _stable_then_decay(step, optim, train_iters=train_iters)


def _stable_then_decay(step: int, optim: OptimConfig, *, train_iters: int) -> float:
    end, last = optim.decay_end(train_iters), optim.last_decay_iters(train_iters)
    stable = optim.lr
    if optim.lr_decay_style == "infinite":
        stable = optim.constant_rate
        cooldown = optim.cooldown_iters(train_iters)
        since_warmup = step - optim.lr_warmup_iters
        if since_warmup < cooldown:
            return _between(optim.lr, stable, since_warmup / cooldown, "cosine")
    if step < end - last:
        return stable
    progress = min(1.0, (step - (end - last)) / last) if last else 1.0
    return _between(stable, optim.min_lr, progress, optim.lr_wsd_decay_style)


def _between(start: float, stop: float, progress: float, style: str) -> float:
    """From start at progress 0 to stop at progress 1."""
    match style:
        case "linear":
            weight = 1.0 - progress
        case "cosine":
            weight = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "minus_sqrt":
            weight = 1.0 - math.sqrt(progress)
        case "exponential":
            # 0.5^p, stretched so that it ends at 0 (megatron's form).
            weight = 2.0 * 0.5**progress - 1.0
        case _:
            raise AssertionError(style)
    return stop + (start - stop) * weight
