"""The experts of one rank, forward and backward by hand, so that a scheduler can place the parts.

    rows of expert i, with weight w:   z = W1_i x,  a = silu(gate) * up of z,  y = sum w W2_i a

    answers        b = W2_i^T g             for the gradient g of an answer
    to the router  dw = a . b               no need to keep W2_i a
    to the tokens  dz = swiglu'(w b),  dx = sum W1_i^T dz
    to the weights dW1_i = dz^T x,  dW2_i = g^T (w a)

What goes home (dw, dx) is wanted soon, the gradients of the weights only at the end: they are made
of all chunks at once while rows travel, in one product for each expert, so the sum over tokens has
one order whatever the schedule. Kept from forward: x as it arrived, and z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.dispatch.route import Route
from moe.experts import grouped_linear, why_not_grouped_mm
from moe.permutation import permute, unpermute
from moe.swiglu import swiglu, swiglu_backward


@dataclass(frozen=True, slots=True)
class Kept:
    """Of one chunk, from forward to backward.

    Attributes:
        arrived: [num arrived, hidden_size].
        gate_up: [num_rows, 2 * ffn_size], rows expert by expert.
    """

    arrived: Tensor
    gate_up: Tensor


@dataclass(frozen=True, slots=True)
class WeightGradParts:
    """Of one chunk, what the gradients of the weights are made of; rows expert by expert.

    Attributes:
        grad_gate_up: [num_rows, 2 * ffn_size].
        grad_outputs: [num_rows, hidden_size].
        activations: [num_rows, ffn_size], times the rows' weights.
        arrived: [num arrived, hidden_size]; row r is arrived[sources[r]].
        counts: int64 [num_local_experts].
    """

    grad_gate_up: Tensor
    grad_outputs: Tensor
    activations: Tensor
    arrived: Tensor
    sources: Tensor
    counts: Tensor


def forward_step(
    arrived: Tensor, route: Route, linear_fc1: Tensor, linear_fc2: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted answers [num arrived, hidden_size], and gate_up to be kept."""
    rows = permute(arrived, route.permutation)
    gate_up = grouped_linear(rows, linear_fc1, route.counts)
    outputs = grouped_linear(swiglu(gate_up), linear_fc2, route.counts)
    return unpermute(outputs, route.weights, route.permutation), gate_up


def backward_step(
    grad_answers: Tensor, kept: Kept, route: Route, linear_fc1: Tensor, linear_fc2: Tensor
) -> tuple[Tensor, Tensor, WeightGradParts]:
    """Gradients of the arrived rows and of `route.weights`, and the rest for later.

    Args:
        grad_answers: [num arrived, hidden_size].
    """
    permutation = route.permutation
    wide = torch.promote_types(grad_answers.dtype, torch.float32)
    grad_outputs = permute(grad_answers, permutation)
    weights = route.weights.reshape(-1)[permutation.choices]
    activations = swiglu(kept.gate_up)
    grad_activations = grouped_linear(grad_outputs, linear_fc2.transpose(1, 2), route.counts)
    grad_of_row = (activations.to(wide) * grad_activations).sum(dim=1)
    grad_weights = torch.zeros_like(route.weights).view(-1)
    grad_weights[permutation.choices] = grad_of_row.to(grad_weights.dtype)
    factors = weights[:, None].to(wide)
    grad_gate_up = swiglu_backward(
        kept.gate_up, (grad_activations * factors).to(grad_activations.dtype)
    )
    grad_rows = grouped_linear(grad_gate_up, linear_fc1.transpose(1, 2), route.counts)
    parts = WeightGradParts(
        grad_gate_up=grad_gate_up,
        grad_outputs=grad_outputs,
        activations=(activations * factors).to(activations.dtype),
        arrived=kept.arrived,
        sources=permutation.sources,
        counts=route.counts,
    )
    # The transpose of `permute`: sums over a row's experts.
    ones = torch.ones_like(route.weights)
    grad_arrived = unpermute(grad_rows, ones, permutation)
    return grad_arrived, grad_weights.view(route.weights.shape), parts


def weight_gradients(
    parts: Sequence[WeightGradParts], linear_fc1: Tensor, linear_fc2: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of both weights, from the chunks in order; 0 for an expert without rows."""
    fc1, fc2 = torch.empty_like(linear_fc1), torch.empty_like(linear_fc2)
    if fc1.is_cuda and not why_not_grouped_mm(parts[0].grad_outputs, linear_fc1):
        return _grouped(parts)
    starts = [[0, *part.counts.cumsum(0).tolist()] for part in parts]
    for expert in range(fc1.shape[0]):
        own = [slice(ends[expert], ends[expert + 1]) for ends in starts]
        pairs = list(zip(parts, own, strict=True))
        x = _together([part.arrived[part.sources[rows]] for part, rows in pairs])
        dz = _together([part.grad_gate_up[rows] for part, rows in pairs])
        g = _together([part.grad_outputs[rows] for part, rows in pairs])
        a = _together([part.activations[rows] for part, rows in pairs])
        # Without rows the product is 0.
        torch.mm(dz.t(), x, out=fc1[expert])
        torch.mm(g.t(), a, out=fc2[expert])
    return fc1, fc2


def _together(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _grouped(parts: Sequence[WeightGradParts]) -> tuple[Tensor, Tensor]:
    """One kernel for all experts; rows of all chunks are put expert by expert first."""
    counts = torch.stack([part.counts for part in parts])
    num_rows = sum(part.sources.numel() for part in parts)
    if num_rows == 0:
        # The kernel may refuse rows of no length.
        first, num_experts = parts[0], counts.shape[1]
        fc1 = first.arrived.new_zeros(
            num_experts, first.grad_gate_up.shape[1], first.arrived.shape[1]
        )
        fc2 = first.arrived.new_zeros(
            num_experts, first.grad_outputs.shape[1], first.activations.shape[1]
        )
        return fc1, fc2
    experts = torch.arange(counts.shape[1], device=counts.device).repeat(len(parts))
    of_row = experts.repeat_interleave(counts.reshape(-1), output_size=num_rows)
    order = of_row.argsort(stable=True)

    def sorted_rows(chunks: list[Tensor]) -> Tensor:
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks).index_select(0, order)

    ends = counts.sum(dim=0).cumsum(0).to(torch.int32)
    x = sorted_rows([part.arrived.index_select(0, part.sources) for part in parts])
    dz = sorted_rows([part.grad_gate_up for part in parts])
    g = sorted_rows([part.grad_outputs for part in parts])
    a = sorted_rows([part.activations for part in parts])
    return torch._grouped_mm(dz.t(), x, offs=ends), torch._grouped_mm(g.t(), a, offs=ends)
