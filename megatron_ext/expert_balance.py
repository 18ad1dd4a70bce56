"""Balance of the experts over the global batch: exact, with one collective a step for its counts.

    L = coefficient * sum_t sum_i w_i p_ti,   w_i = E f_i - 1,   f of the whole batch ("Demons in
                                                                 the Detail", 2501.11873, Eq. 3)

f is known only when all micro-batches of all ranks have run, and ranks run different numbers of
them, so nothing is exchanged in between. Each router counts and keeps its inputs. At the end

    1. counts, and all figures of the step, are summed over all ranks, all layers at once;
    2. each rank computes the gradient dL/dW of its routers over its tokens, while megatron's
       reduction of the other gradients may still be on its way;
    3. that is summed over the ranks that hold the router, all layers at once, divided by the
       batch's tokens, and added to what megatron has reduced.

So it does not matter how tokens are cut into ranks and micro-batches; the paper's buffer, and
megatron's loss, take f over what has been seen so far. Backward into the hidden states runs long
before f is known: there w is that of the step before (0 in the first), which is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ext.config import Config
from megatron_ext.layer_balance import LayerBalance
from megatron_ext.metrics import Record
from megatron_ext.model import unwrap
from megatron_ext.moe_layer import MoEMLP
from megatron_ext.moe_router import Router
from moe.balance import device_excess, excess_load
from moe.deferred_balance import GateInputs


@dataclass(frozen=True, slots=True)
class StepLoad:
    """How the experts were chosen in one step: sums over all ranks and micro-batches, everywhere
    the same. Rows are the model's layers with experts, in their order, over all pipeline stages.

    Attributes:
        layers: their numbers in the model, from 0.
        counts: int64 [num_layers, num_experts], choices that were computed.
        demand: int64 [num_layers, num_experts], choices, refused ones too.
        rank_counts: float64 [num_layers, num_experts], what this rank's tokens are of `counts`.
        probabilities: float64 [num_layers, num_experts], summed over tokens.
        micro_batch_excess, sequence_excess: float64 [num_layers], sum over micro-batches
            (documents) of T (LBL - 1); 0 where that loss is not asked for.
    """

    layers: tuple[int, ...]
    counts: Tensor
    demand: Tensor
    rank_counts: Tensor
    probabilities: Tensor
    micro_batch_excess: Tensor
    sequence_excess: Tensor


class ExpertBalance:
    """Around megatron's end of a step; see the module."""

    def __init__(self, chunks: Sequence[nn.Module], config: Config) -> None:
        """Connect the routers of this rank's chunks and `finalize_model_grads_func`."""
        self.layers = tuple(i for i, has_experts in enumerate(config.moe_layers) if has_experts)
        self._coefficients = config.balance_coefficients
        self._num_groups = config.num_balance_groups
        self._seed = config.train.seed
        assert config.moe.num_moe_experts is not None
        self._num_experts = config.moe.num_moe_experts
        self._statistics = torch.zeros(
            len(self.layers),
            3 * self._num_experts + 2,
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        self.routers: dict[int, Router] = {}
        """Those of this rank, by the row of their layer in `StepLoad`."""
        self._beside: dict[int, LayerBalance] = {}
        for chunk in chunks:
            for layer in unwrap(chunk).decoder.layers:
                if isinstance(layer.mlp, MoEMLP):
                    self._connect(self.layers.index(layer.layer_number - 1), layer.mlp.router)
        self._step: StepLoad | None = None
        megatron_config = unwrap(chunks[0]).config
        self._finalize_others: Callable[..., None] = megatron_config.finalize_model_grads_func
        megatron_config.finalize_model_grads_func = self._finalize

    def _connect(self, row: int, router: Router) -> None:
        self.routers[row] = router
        self._beside[row] = router.balance = LayerBalance(
            self._coefficients,
            num_groups=self._num_groups,
            last_demand=router.last_demand,
            statistics=self._statistics[row],
            inputs=GateInputs(on_host=router.moe.moe_router_inputs_on_host),
        )

    @property
    def step(self) -> StepLoad:
        """The load of the last step; there from the end of its last backward pass on."""
        assert self._step is not None, "no step has ended yet"
        return self._step

    def begin_step(self, step: int) -> None:
        """Before the first micro-batch; step: counted from 0."""
        for row, router in self.routers.items():
            router.begin_step(seed=self._seed, step=step, layer=self.layers[row])

    def end_step(self) -> None:
        """The step was applied: what follows from its load for the next one."""
        warming_up = [router.logit_sums for router in self.routers.values() if router.is_warming_up]
        if warming_up:
            sums = torch.stack(warming_up)
            dist.all_reduce(sums, group=parallel_state.get_tensor_and_data_parallel_group())
            for of_rank, of_all in zip(warming_up, sums, strict=True):
                of_rank.copy_(of_all)
        for row, router in self.routers.items():
            router.end_step(self.step.demand[row])

    def losses(self, num_tokens: int) -> Record:
        """Each balance loss that is asked for, the mean over tokens, summed over the layers.

        Without its coefficient, so that it is the number of layers where all is even.
        """
        if not self._coefficients:
            return {}
        step = self.step
        excess = excess_load(step.demand)
        device = device_excess(excess, num_groups=self._num_groups)
        found = {
            "aux_loss": step.micro_batch_excess.sum(),
            "seq_aux_loss": step.sequence_excess.sum(),
            "global_aux_loss": (step.probabilities * excess).sum(),
            "device_aux_loss": (step.probabilities * device).sum(),
        }
        names = list(self._coefficients)
        sums = torch.stack([found[name] for name in names]).tolist()
        return {
            f"moe_{name}": len(self.layers) + total / max(1, num_tokens)
            for name, total in zip(names, sums, strict=True)
        }

    def _finalize(self, chunks: list[Any], num_tokens: Tensor | None = None, **how: Any) -> None:
        """In the place of megatron's `finalize_model_grads`, after the last backward pass."""
        self._step = self._sum_over_ranks()
        gradients = self._gradients()
        # Afterwards `num_tokens` is the whole batch's.
        self._finalize_others(chunks, num_tokens, **how)
        if gradients:
            assert num_tokens is not None, "gradients are divided by the batch's tokens"
            self._add(gradients, num_tokens)

    def _sum_over_ranks(self) -> StepLoad:
        size = self._num_experts
        rank_counts = self._statistics[:, :size].clone()
        # A layer is on the ranks of one stage; the others add zeros.
        dist.all_reduce(self._statistics)
        sums = self._statistics.clone()
        self._statistics.zero_()
        counts, demand, probabilities, excess = torch.split(sums, [size, size, size, 2], dim=1)
        return StepLoad(
            layers=self.layers,
            counts=counts.long(),
            demand=demand.long(),
            rank_counts=rank_counts,
            probabilities=probabilities,
            micro_batch_excess=excess[:, 0],
            sequence_excess=excess[:, 1],
        )

    def _gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """This rank's share of dL/dW, float32, for the parameters of its routers."""
        found: list[tuple[nn.Parameter, Tensor]] = []
        for row, router in self.routers.items():
            beside = self._beside[row]
            if not beside.is_deferred:
                continue
            parameters = [p for p in router.parameters() if p.requires_grad]
            excess = beside.excess(self.step.demand[row])
            gradients = beside.inputs.gradient(router.probabilities, parameters, excess)
            beside.inputs.clear()
            found += zip(parameters, gradients, strict=True)
        return found

    def _add(self, gradients: list[tuple[nn.Parameter, Tensor]], num_tokens: Tensor) -> None:
        flat = torch.cat([gradient.reshape(-1) for _, gradient in gradients])
        dist.all_reduce(flat, group=parallel_state.get_tensor_and_data_parallel_group())
        flat /= num_tokens.clamp_min(1)
        sizes = [gradient.numel() for _, gradient in gradients]
        for (parameter, _), gradient in zip(gradients, torch.split(flat, sizes), strict=True):
            # With ZeRO-1 each rank reads its range of this only.
            main_grad: Tensor = getattr(parameter, "main_grad")  # noqa: B009
            main_grad.add_(gradient.view_as(main_grad))
