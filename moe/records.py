"""What a router decided: for each token its experts and how much each of them counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """The choice for the tokens of one rank in one micro-batch.

    Attributes:
        experts: int64 [num_tokens, topk], the chosen experts by their global number, best first;
            no expert twice for one token.
        weights: float32 [num_tokens, topk], what each chosen expert's output is multiplied by;
            differentiable.
        probabilities: float32 [num_tokens, num_experts], the gate before the choice;
            differentiable. Balancing losses are made of it and of `counts`.
        counts: int64 [num_experts], how many of these tokens go to each expert.
    """

    experts: Tensor
    weights: Tensor
    probabilities: Tensor
    counts: Tensor

    @property
    def num_tokens(self) -> int:
        return self.experts.shape[0]

    @property
    def topk(self) -> int:
        return self.experts.shape[1]

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]
