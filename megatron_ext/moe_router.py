"""The gate of one layer: the parts of `moe.router` put together as the configuration says.

What changes a choice without being learned by gradient (a bias, running figures of the logits)
stands in buffers, which are saved with the weights and change between steps only: `begin_step` and
`end_step` are called around one (`expert_balance`). Noise, a warm-up and a limit on the experts'
tokens belong to training; held-out text is routed without.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ext.batch import PackedDocuments
from megatron_ext.layer_balance import LayerBalance
from megatron_ext.moe_config import MoEConfig
from moe.gate.cosine import cosine_logits, first_temperature
from moe.gate.expert_bias import updated_bias
from moe.gate.noise import LogitSums, noisy_logits, warmup_logits
from moe.gate.random_numbers import token_keys
from moe.gate.scores import gate_probabilities
from moe.records import Routing
from moe.router import RouterOptions, route, router_logits, z_loss
from moe.side_loss import attach_loss


class Router(nn.Module):
    """The gate of one layer.

    Attributes:
        weight: [num_moe_experts, hidden_size]; with x_moe [num_moe_experts, projected_size].
        last_demand: int64 [num_moe_experts], choices of each expert in the last step, over all
            ranks.
        balance: what counts and balances choices in training; `expert_balance` puts it here.
        expert_bias: float32 [num_moe_experts], added to the scores for the choice alone.
        logit_statistics: float32 [2], running mean and deviation of the logits.
        logit_sums: float64 [3], `LogitSums` of this rank's tokens in this step.
    """

    last_demand: Tensor
    expert_bias: Tensor
    logit_statistics: Tensor
    logit_sums: Tensor

    def __init__(self, config: TransformerConfig, moe: MoEConfig) -> None:
        super().__init__()
        assert moe.num_moe_experts is not None
        self.moe, self.options = moe, router_options(moe)
        self.balance: LayerBalance | None = None
        self.seed = self.layer = self.step = 0
        num_experts, hidden_size = moe.num_moe_experts, config.hidden_size
        is_cosine = moe.moe_router_type == "x_moe"
        self.weight = _parameter(
            config, num_experts, moe.projected_size if is_cosine else hidden_size
        )
        if is_cosine:
            self.projection = _parameter(config, moe.projected_size, hidden_size)
            # It starts at 1, as vectors do (`init_parameters`).
            self.scale = _parameter(config, 1)
        if moe.moe_router_type == "noisy_topk":
            self.noise_weight = _parameter(config, num_experts, hidden_size)
        self.register_buffer("last_demand", torch.zeros(num_experts, dtype=torch.int64))
        if moe.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(num_experts))
        if moe.moe_router_warmup_steps:
            self.register_buffer("logit_statistics", torch.tensor([0.0, 1.0]))
            sums = torch.zeros(3, dtype=torch.float64)
            self.register_buffer("logit_sums", sums, persistent=False)

    def logits(self, tokens: Tensor) -> Tensor:
        """float32 [num_tokens, num_moe_experts], without noise."""
        if self.moe.moe_router_type != "x_moe":
            return router_logits(tokens, self.weight)
        temperature = first_temperature(self.options.score_function)
        return cosine_logits(
            tokens, self.projection, self.weight, self.scale, temperature=temperature
        )

    def probabilities(self, tokens: Tensor) -> Tensor:
        """`Routing.probabilities` of these tokens, a function of them and of the weights alone."""
        return gate_probabilities(self.logits(tokens), self.options.score_function)

    def forward(self, tokens: Tensor, documents: PackedDocuments | None = None) -> Routing:
        """tokens: [num_tokens, hidden_size]; documents: of the row that they are from."""
        # Where it is run again for its gradient (recomputation), only that counts.
        is_counted = self.training and torch.is_grad_enabled()
        balance = self.balance if is_counted else None
        if balance is not None:
            tokens = balance.take(tokens, self.probabilities)
        logits = self.logits(tokens)
        if self.moe.moe_z_loss_coeff and torch.is_grad_enabled():
            logits = attach_loss(logits, self.moe.moe_z_loss_coeff * z_loss(logits))
        if is_counted and self.is_warming_up:
            self.logit_sums += LogitSums.of(logits).sums
        routing = self._choose(tokens, logits, documents)
        return routing if balance is None else balance.add(routing, documents)

    def _choose(self, tokens: Tensor, logits: Tensor, documents: PackedDocuments | None) -> Routing:
        bias = self.expert_bias if self.moe.moe_router_enable_expert_bias else None
        if not self.training:
            return route(logits, self.options, bias=bias, is_limited=False)
        keys = self._keys(tokens, documents) if self._draws else None
        noisy = None
        if keys is not None and self.moe.moe_router_type == "noisy_topk":
            noisy = noisy_logits(logits, router_logits(tokens, self.noise_weight), keys=keys)
        if keys is not None and self.is_warming_up:
            share = self.step / self.moe.moe_router_warmup_steps
            noisy = warmup_logits(logits, share=share, statistics=self.logit_statistics, keys=keys)
        return route(logits, self.options, noisy_logits=noisy, bias=bias, keys=keys)

    @property
    def is_warming_up(self) -> bool:
        """Whether choices of this step are mixed with noise that then ends."""
        return self.step < self.moe.moe_router_warmup_steps

    @property
    def _draws(self) -> bool:
        moe = self.moe
        is_random = moe.moe_expert_capacity_factor and moe.moe_token_drop_policy == "random"
        return bool(is_random) or moe.moe_router_type == "noisy_topk" or self.is_warming_up

    def _keys(self, tokens: Tensor, documents: PackedDocuments | None) -> Tensor:
        if documents is None or documents.token_ids is None:
            ids = torch.arange(tokens.shape[0], device=tokens.device)
        else:
            size = parallel_state.get_tensor_model_parallel_world_size()
            rank = parallel_state.get_tensor_model_parallel_rank()
            first = documents.token_ids.numel() // size * rank
            ids = documents.token_ids[first : first + tokens.shape[0]]
        return token_keys(ids, seed=self.seed, step=self.step, layer=self.layer)

    def begin_step(self, *, seed: int, step: int, layer: int) -> None:
        """Before the first micro-batch of an optimizer step: what its noise depends on.

        Args:
            step: counted from 0.
            layer: number of this layer in the model.
        """
        self.seed, self.step, self.layer = seed, step, layer
        if self.moe.moe_router_warmup_steps:
            self.logit_sums.zero_()

    def end_step(self, demand: Tensor) -> None:
        """After a step that was applied; `logit_sums` are those of all ranks.

        Args:
            demand: int64 [num_moe_experts], choices of each expert over all ranks.
        """
        moe = self.moe
        self.last_demand.copy_(demand)
        if moe.moe_router_enable_expert_bias:
            rate = moe.moe_router_bias_update_rate
            self.expert_bias.copy_(updated_bias(self.expert_bias, demand, rate=rate))
        if self.is_warming_up:
            self.logit_statistics.copy_(LogitSums(self.logit_sums).into(self.logit_statistics))


def router_options(moe: MoEConfig) -> RouterOptions:
    """The section `moe` as options of a choice."""
    is_softmax = moe.moe_router_score_function == "softmax"
    return RouterOptions(
        topk=moe.moe_router_topk,
        score_function=moe.moe_router_score_function,
        is_renormalised=not moe.moe_router_pre_softmax if is_softmax else moe.moe_router_topk > 1,
        scaling_factor=moe.moe_router_topk_scaling_factor or 1.0,
        num_groups=moe.moe_router_num_groups,
        group_topk=moe.moe_router_group_topk,
        is_expert_choice=moe.moe_router_type == "expert_choice",
        capacity_factor=moe.moe_expert_capacity_factor,
        drop_policy=moe.moe_token_drop_policy,
    )


def _parameter(config: TransformerConfig, *shape: int) -> nn.Parameter:
    """`init_parameters` fills it."""
    device = torch.cuda.current_device()
    weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
    # Ranks see different tokens then, so megatron sums this gradient over the tensor group.
    setattr(weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
    return weight
