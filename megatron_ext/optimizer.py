"""AdamW and Lion inside megatron's (distributed) optimizer.

megatron owns gradients, clipping, fp32 main parameters and their spread over the data-parallel
ranks (ZeRO-1); it only knows how to make Adam and SGD. So it is asked for Adam, and the torch
optimizer inside is replaced, over the same parameter groups, by the one that was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_ext.config import Config, OptimConfig

# Tensors that each optimizer keeps per parameter.
STATE_NAMES = {"adam": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, algorithm 2), decoupled weight decay.

    update = sign(beta1 * m + (1 - beta1) * g); p -= lr * (update + weight_decay * p);
    m = beta2 * m + (1 - beta2) * g.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "megatron calls step without a closure"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                exp_avg, grad = state["exp_avg"], parameter.grad
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                update = torch.lerp(grad, exp_avg, beta1).sign_()
                parameter.add_(update, alpha=-group["lr"])
                exp_avg.lerp_(grad, 1.0 - beta2)


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], config: Config, *, dtype: torch.dtype
) -> ChainedOptimizer:
    """megatron's optimizer over the model chunks, with the chosen update rule inside."""
    optim = config.optim
    megatron_config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    chained = get_megatron_optimizer(megatron_config, list(chunks), use_gloo_process_groups=False)
    for part in chained.chained_optimizers:
        part.optimizer = _update_rule(part.optimizer, optim)
    return chained


def _update_rule(adam: torch.optim.Optimizer, optim: OptimConfig) -> torch.optim.Optimizer:
    """The chosen optimizer over the parameter groups of megatron's Adam."""
    # The distributed optimizer's float32 shards are views, which a torch optimizer refuses in its
    # constructor but not in its groups.
    nothing = [torch.zeros(0, device=torch.cuda.current_device())]
    rule: torch.optim.Optimizer
    if optim.optimizer == "lion":
        betas = (optim.lion_beta1, optim.lion_beta2)
        rule = Lion(nothing, lr=optim.lr, betas=betas, weight_decay=optim.weight_decay)
    else:
        rule = torch.optim.AdamW(
            nothing,
            lr=optim.lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
            weight_decay=optim.weight_decay,
            # One pass over memory instead of ten.
            fused=True,
        )
    rule.param_groups = [
        {**rule.defaults, **{k: v for k, v in group.items() if k not in adam.defaults}}
        for group in adam.param_groups
    ]
    return rule


def set_learning_rate(optimizer: ChainedOptimizer, lr: float, *, weight_decay: float) -> None:
    """Set every group's rate and decay; norms and biases (wd_mult 0) are not decayed."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]


def clip_and_step(optimizer: ChainedOptimizer, *, clip_grad: float) -> tuple[float, bool]:
    """Clip by the global norm and update, unless the norm is not finite.

    The norm is summed over all ranks, so all ranks decide alike.

    Returns:
        (global L2 norm before clipping, whether parameters were updated).
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm, False
    if clip_grad > 0.0:
        for part in optimizer.chained_optimizers:
            if not getattr(part, "is_stub_optimizer", False) and part.get_parameters():
                clip_grad_by_total_norm_fp32(
                    part.get_parameters(), max_norm=clip_grad, total_norm=grad_norm
                )
    optimizer.step_with_ready_grads()
    return grad_norm, True


def main_parameter(part: Any, parameter: Tensor) -> tuple[Tensor, slice] | None:
    """This rank's optimizer copy of a model parameter and the flat range of it that it covers.

    Args:
        part: one of `ChainedOptimizer.chained_optimizers`.
        parameter: a parameter of this rank's model.

    Returns:
        (tensor, range), or None where another data-parallel rank holds all of this parameter.
    """
    if not hasattr(part, "model_param_group_index_map"):
        main = getattr(parameter, "main_param", None)
        return (parameter if main is None else main), slice(0, parameter.numel())
    if parameter not in part.model_param_group_index_map:
        return None
    group, order = part.model_param_group_index_map[parameter]
    held = part._get_model_param_range_map(parameter)["param"]
    return part.optimizer.param_groups[group]["params"][order], slice(held.start, held.end)
