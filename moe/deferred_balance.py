"""The gradient of a balance loss whose weights are known only after the whole batch has been seen.

    L = sum_t sum_i w_i p_ti        p_t = gate(x_t; W),   w from the counts of all tokens

While the batch runs, the inputs x_t of the gate are kept as they are (they are not copied, unless
to the host's memory, and stay in the model's dtype). When w is known the gate is run on them again,
part by part, for dL/dW alone; W must not have changed in between. The cut into parts changes
nothing but the order of a sum.

In the hidden states x the loss has a gradient too, and that is wanted while backward runs, before w
is there. `push_back` adds it for given weights, for instance those of the batch before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.balance import balance_loss

Gate = Callable[[Tensor], Tensor]
"""Tokens [num_tokens, hidden_size] to probabilities float32 [num_tokens, num_experts]."""


class GateInputs:
    """What one gate was given in the course of a batch.

    Memory: num_tokens * hidden_size * bytes per element, over all tokens of this rank in the batch
    (not only those of the micro-batches in flight). With `on_host` that is memory of the host, and
    each input crosses the link to it twice, in the order of the device's other work.
    """

    def __init__(self, *, on_host: bool = False) -> None:
        self.is_on_host = on_host
        self._parts: list[Tensor] = []

    def add(self, tokens: Tensor) -> None:
        """Keep [num_tokens, hidden_size]; without its history, and without a copy on its device."""
        if tokens.shape[0]:
            part = tokens.detach()
            # Into pinned memory, so that the host does not wait.
            self._parts.append(part.to("cpu", non_blocking=True) if self.is_on_host else part)

    def clear(self) -> None:
        self._parts.clear()

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def gradient(self, gate: Gate, parameters: Sequence[Tensor], excess: Tensor) -> list[Tensor]:
        """d/dparameters of the loss over all that was kept; float32, zeros where nothing was.

        Args:
            gate: differentiable in `parameters`.
            excess: w, [num_experts].
        """
        total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for part in self._parts:
            tokens = part.to(excess.device, non_blocking=True)
            with torch.enable_grad():
                loss = balance_loss(gate(tokens), excess)
            found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
            for sum_so_far, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    sum_so_far.add_(gradient)
        return total


class _PushBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gate: Gate, weights: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.gate, ctx.weights = gate, weights
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        if not tokens.shape[0]:
            return grad_output, None, None
        with torch.enable_grad():
            inputs = tokens.detach().requires_grad_()
            loss = balance_loss(ctx.gate(inputs), ctx.weights())
        (gradient,) = torch.autograd.grad(loss, inputs)
        return grad_output + gradient, None, None


def push_back(tokens: Tensor, gate: Gate, weights: Callable[[], Tensor]) -> Tensor:
    """`tokens` as they are; backward, the loss adds its gradient to theirs and to nothing else.

    Args:
        tokens: [num_tokens, hidden_size], what the gate gets.
        weights: gives w, [num_experts]; asked in the backward pass.
    """
    return _PushBack.apply(tokens, gate, weights)  # type: ignore[no-any-return, no-untyped-call]
