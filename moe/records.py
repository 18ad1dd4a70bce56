"""What a router decided: for each token its experts and how much each of them counts.

A place in the choice that leads to no expert (the expert was full, or fewer experts chose this
token than another) holds the number `num_experts`, which is nobody's: "nowhere".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """The choice for the tokens of one rank in one micro-batch.

    Attributes:
        experts: int64 [num_tokens, topk], the chosen experts by their global number, best first;
            no expert twice for one token; `num_experts` is nowhere.
        weights: float32 [num_tokens, topk], what each chosen expert's output is multiplied by;
            differentiable; 0 for nowhere.
        probabilities: float32 [num_tokens, num_experts], the gate before the choice, without noise
            or bias; its rows sum to 1; differentiable. Balancing losses are made of it and of
            `demand`.
        counts: int64 [num_experts], how many of these tokens go to each expert.
        dropped: int64 [num_experts], how many more had chosen it and were refused; None where no
            choice can lead nowhere. So the host knows that without asking a GPU.
        unlimited: int64 [num_tokens, topk], `experts` before any was refused; None where no expert
            has a limit.
    """

    experts: Tensor
    weights: Tensor
    probabilities: Tensor
    counts: Tensor
    dropped: Tensor | None = None
    unlimited: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.experts.shape[0]

    @property
    def topk(self) -> int:
        return self.experts.shape[1]

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]

    @property
    def has_nowhere(self) -> bool:
        """Whether `experts` may name nowhere; if not, every choice is a row."""
        return self.dropped is not None

    @property
    def demand(self) -> Tensor:
        """int64 [num_experts], how many tokens chose each expert, refused or not."""
        return self.counts if self.dropped is None else self.counts + self.dropped

    @property
    def wanted(self) -> Tensor:
        """int64 [num_tokens, topk], the experts that each token chose, refused or not."""
        return self.experts if self.unlimited is None else self.unlimited

    def num_rows(self) -> int:
        """Choices that lead somewhere; the host waits for a GPU if `has_nowhere`."""
        return int(self.counts.sum()) if self.has_nowhere else self.experts.numel()
