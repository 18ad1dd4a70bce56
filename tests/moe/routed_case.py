"""Mixture-of-experts problems with a choice made by hand, and the layer computed in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from moe.records import Routing
from moe.router import count_tokens

Choice = Literal["random", "all to one", "none for one"]
Layer = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class RoutedCase:
    """One layer: its sizes, its tokens and who chooses whom."""

    num_tokens: int
    num_experts: int
    topk: int
    hidden_size: int = 8
    ffn_size: int = 16
    choice: Choice = "random"
    seed: int = 0
    dropped_share: float = 0.0

    def experts(self) -> Tensor:
        """int64 [num_tokens, topk]; a dropped choice leads nowhere."""
        scores = torch.rand(self.num_tokens, self.num_experts, generator=self._generator(1))
        if self.choice == "all to one":
            scores[:, -1] = 2.0
        elif self.choice == "none for one" and self.num_experts > self.topk:
            scores[:, 0] = -1.0
        experts = scores.topk(self.topk, dim=-1).indices
        is_dropped = torch.rand(experts.shape, generator=self._generator(4)) < self.dropped_share
        return experts.masked_fill(is_dropped, self.num_experts)

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """tokens, weights, linear_fc1, linear_fc2."""
        generator = self._generator(2)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return [
            draw(self.num_tokens, self.hidden_size).to(dtype),
            draw(self.num_tokens, self.topk).to(
                torch.float64 if dtype == torch.float64 else torch.float32
            ),
            draw(self.num_experts, 2 * self.ffn_size, self.hidden_size).to(dtype),
            draw(self.num_experts, self.hidden_size, self.ffn_size).to(dtype),
        ]

    def grad(self, dtype: torch.dtype) -> Tensor:
        """The gradient of the output."""
        return torch.randn(self.num_tokens, self.hidden_size, generator=self._generator(3)).to(
            dtype
        )

    def routing(self, weights: Tensor) -> Routing:
        return routing_of(self.experts(), weights, num_experts=self.num_experts)

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(10 * self.seed + stream)


def routing_of(experts: Tensor, weights: Tensor, *, num_experts: int) -> Routing:
    counts = count_tokens(experts, num_experts=num_experts)
    # Who refused the dropped ones is not known here, and nothing depends on it.
    has_nowhere = bool((experts == num_experts).any())
    return Routing(
        experts=experts,
        weights=weights,
        probabilities=torch.full((len(experts), num_experts), 1.0 / num_experts),
        counts=counts,
        dropped=torch.zeros_like(counts) if has_nowhere else None,
    )


def output_and_gradients(layer: Layer, case: RoutedCase, dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients of tokens, weights, linear_fc1 and linear_fc2."""
    leaves = [leaf.requires_grad_() for leaf in case.leaves(dtype)]
    tokens, weights, linear_fc1, linear_fc2 = leaves
    output = layer(tokens, case.routing(weights), linear_fc1, linear_fc2)
    grads = torch.autograd.grad(output, leaves, case.grad(output.dtype))
    return [output.detach(), *grads]


def cases(max_tokens: int = 12) -> st.SearchStrategy[RoutedCase]:
    """Small and ugly sizes."""

    def with_topk(case: RoutedCase) -> st.SearchStrategy[RoutedCase]:
        return st.integers(1, min(3, case.num_experts)).map(lambda topk: replace(case, topk=topk))

    return st.builds(
        RoutedCase,
        num_tokens=st.integers(0, max_tokens),
        num_experts=st.integers(1, 6),
        topk=st.just(1),
        hidden_size=st.integers(1, 9),
        ffn_size=st.integers(1, 9),
        choice=st.sampled_from(["random", "all to one", "none for one"]),
        seed=st.integers(0, 99),
    ).flatmap(with_topk)
