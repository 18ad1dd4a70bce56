"""The gate: which experts see a token, and with what weight.

    logits l = W x  ->  scores s = softmax(l) or sigmoid(l)  ->  the k largest  ->  weights

    weight_i = s_i, or renormalised over the chosen, s_i / sum of the chosen s

With softmax the latter is the softmax of the chosen logits alone (GShard, Mixtral). Variations hook
in where they differ: other logits (`moe.gate.cosine`), noise on them (`moe.gate.noise`), a bias on
the scores that only the choice sees (`moe.gate.expert_bias`), fewer groups to choose from
(`moe.gate.group_limit`), experts that choose tokens (`moe.gate.expert_choice`), and a limit on how
many an expert takes (`moe.capacity`); without it nothing is dropped.

Everything from the logits on is float32 whatever the model's dtype: a rounding to bf16 would change
choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.capacity import DropPolicy, expert_capacity, within_capacity
from moe.gate.expert_choice import expert_choice
from moe.gate.group_limit import limit_to_groups
from moe.gate.scores import ScoreFunction, chosen_weights, gate_probabilities, gate_scores
from moe.records import Routing


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """How a choice is made.

    Attributes:
        topk: experts of one token, at most num_experts; with expert choice their mean number.
        score_function: what logits become.
        is_renormalised: the weights of one token sum to 1 (to `scaling_factor`); with topk=1 they
            are constant then, and the router learns nothing from the loss.
        scaling_factor: all weights are multiplied by it (DeepSeek-V2 and later).
        num_groups, group_topk: see `limit_to_groups`.
        is_expert_choice: experts choose tokens.
        capacity_factor: see `moe.capacity`; None drops nothing.
        drop_policy: who is refused by a full expert.
    """

    topk: int
    score_function: ScoreFunction = "softmax"
    is_renormalised: bool = True
    scaling_factor: float = 1.0
    num_groups: int | None = None
    group_topk: int | None = None
    is_expert_choice: bool = False
    capacity_factor: float | None = None
    drop_policy: DropPolicy = "probs"


def router_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """Logits of all experts, float32 [num_tokens, num_experts].

    Args:
        tokens: [num_tokens, hidden_size], any float dtype.
        weight: [num_experts, hidden_size].
    """
    return torch.nn.functional.linear(tokens.float(), weight.float())


def route(
    logits: Tensor,
    options: RouterOptions,
    *,
    noisy_logits: Tensor | None = None,
    bias: Tensor | None = None,
    keys: Tensor | None = None,
    is_limited: bool = True,
) -> Routing:
    """The choice for these tokens.

    Args:
        logits: float32 [num_tokens, num_experts].
        noisy_logits: what is chosen and weighted by, if not `logits`.
        bias: float32 [num_experts], added to the scores for the choice alone.
        keys: int64 [num_tokens] (`token_keys`), for tokens that are dropped by lot.
        is_limited: false drops nothing, whatever the options say.
    """
    probabilities = gate_probabilities(logits, options.score_function)
    if noisy_logits is None and options.score_function == "softmax":
        scores = probabilities
    else:
        of_choice = logits if noisy_logits is None else noisy_logits
        scores = gate_scores(of_choice, options.score_function)
    if options.is_expert_choice:
        return _expert_choice(scores, probabilities, options)
    experts = _best(scores.detach(), options, bias)
    weights = chosen_weights(
        scores,
        experts,
        is_renormalised=options.is_renormalised,
        scaling_factor=options.scaling_factor,
    )
    counts = count_tokens(experts, num_experts=logits.shape[-1])
    routing = Routing(experts, weights, probabilities, counts)
    has_limit = is_limited and options.capacity_factor is not None
    return _limited(routing, options, keys) if has_limit else routing


def softmax_topk(
    logits: Tensor, *, topk: int, is_renormalised: bool = True, scaling_factor: float = 1.0
) -> Routing:
    """Softmax over all experts, then the `topk` likeliest (GShard, 2006.16668; Mixtral)."""
    return route(
        logits,
        RouterOptions(topk=topk, is_renormalised=is_renormalised, scaling_factor=scaling_factor),
    )


def _best(scores: Tensor, options: RouterOptions, bias: Tensor | None) -> Tensor:
    """Each token's choice, int64 [num_tokens, topk]."""
    if bias is not None:
        scores = scores + bias
    if options.num_groups is not None and options.group_topk is not None:
        scores = limit_to_groups(
            scores,
            topk=options.topk,
            num_groups=options.num_groups,
            group_topk=options.group_topk,
        )
    return scores.topk(options.topk, dim=-1).indices


def _expert_choice(scores: Tensor, probabilities: Tensor, options: RouterOptions) -> Routing:
    num_tokens, num_experts = scores.shape
    factor = 1.0 if options.capacity_factor is None else options.capacity_factor
    capacity = min(
        num_tokens,
        expert_capacity(num_tokens, topk=options.topk, num_experts=num_experts, factor=factor),
    )
    experts, weights = expert_choice(scores, capacity=capacity)
    counts = experts.new_full((num_experts,), capacity)
    return Routing(
        experts, weights * options.scaling_factor, probabilities, counts, torch.zeros_like(counts)
    )


def _limited(routing: Routing, options: RouterOptions, keys: Tensor | None) -> Routing:
    """The same without what full experts refuse; weights stay as they are."""
    assert options.capacity_factor is not None
    num_experts = routing.num_experts
    capacity = expert_capacity(
        routing.num_tokens,
        topk=options.topk,
        num_experts=num_experts,
        factor=options.capacity_factor,
    )
    is_taken = within_capacity(
        routing.experts,
        routing.weights,
        num_experts=num_experts,
        capacity=capacity,
        policy=options.drop_policy,
        keys=keys,
    )
    counts = routing.counts.clamp(max=capacity)
    return Routing(
        experts=routing.experts.masked_fill(~is_taken, num_experts),
        weights=routing.weights.masked_fill(~is_taken, 0.0),
        probabilities=routing.probabilities,
        counts=counts,
        dropped=routing.counts - counts,
        unlimited=routing.experts,
    )


def count_tokens(experts: Tensor, *, num_experts: int) -> Tensor:
    """How often each expert stands in a choice, int64 [num_experts]; nowhere is not counted."""
    chosen = experts.reshape(-1)
    # Unlike bincount it does not make the host wait for a GPU.
    counts = chosen.new_zeros(num_experts + 1).scatter_add_(0, chosen, torch.ones_like(chosen))
    return counts[:num_experts]


def z_loss(logits: Tensor) -> Tensor:
    """sum over tokens of (log sum exp of the logits)^2, float32 scalar (ST-MoE, 2202.08906, Eq. 5).

    A sum and no mean: it is divided by the global batch's tokens together with the loss itself.
    """
    return logits.logsumexp(dim=-1).square().sum()
