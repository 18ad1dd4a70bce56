"""One expert after another, forward and backward, without a copy that is not needed.

    U = X W1^T,   A = swiglu(U),   Y = A W2^T
    dA = dY W2,   dW2 = dY^T A,    dW1 = dU^T X,   dX = dU W1

of each expert. Only X and U of all experts are kept; what lies between is as large as one expert's
share and stays in a CPU's cache. Results are written where they belong.

Where a CPU's kernel library makes a kernel for each new shape (bfloat16), an expert's rows are
filled up with zeros to a multiple of 64: loads differ from step to step, so every product would be
of a new shape, and making its kernel takes about as long as running it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.swiglu import swiglu

_ROW_MULTIPLE = 64


class _ExpertLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, linear_fc1: Tensor, linear_fc2: Tensor, counts: list[int]
    ) -> Tensor:
        sizes = filled_up(counts, _row_multiple(rows))
        gate_up = rows.new_empty(sum(sizes), linear_fc1.shape[1])
        outputs = rows.new_empty(rows.shape[0], linear_fc2.shape[1])
        for i, (x, u, y) in _nonempty(counts, rows, torch.split(gate_up, sizes), outputs):
            torch.mm(_filled(x, len(u)), linear_fc1[i].t(), out=u)
            _product(swiglu(u), linear_fc2[i].t(), into=y)
        ctx.save_for_backward(rows, gate_up, linear_fc1, linear_fc2)
        ctx.counts, ctx.sizes = counts, sizes
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, gate_up, linear_fc1, linear_fc2 = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_fc1, grad_fc2 = torch.empty_like(linear_fc1), torch.empty_like(linear_fc2)
        for i, count in enumerate(ctx.counts):
            if not count:
                grad_fc1[i].zero_()
                grad_fc2[i].zero_()
        parts = (rows, torch.split(gate_up, ctx.sizes), grad, grad_rows)
        for i, (x, u, y, grad_x) in _nonempty(ctx.counts, *parts):
            grad_y = _filled(y, len(u))
            activated, grad_u = _swiglu_again(u, grad_y @ linear_fc2[i])
            torch.mm(grad_y.t(), activated, out=grad_fc2[i])
            torch.mm(grad_u.t(), _filled(x, len(u)), out=grad_fc1[i])
            _product(grad_u, linear_fc1[i], into=grad_x)
        return grad_rows, grad_fc1, grad_fc2, None


def expert_loop(
    rows: Tensor, linear_fc1: Tensor, linear_fc2: Tensor, *, counts: Sequence[int]
) -> Tensor:
    """Each row through its expert; the arguments are those of `moe.experts.run_experts`.

    Args:
        counts: rows of each expert, on the host.
    """
    return _ExpertLoop.apply(rows, linear_fc1, linear_fc2, list(counts))  # type: ignore[no-any-return, no-untyped-call]


def filled_up(counts: Sequence[int], multiple: int) -> list[int]:
    """Rows of each expert, those of zeros included."""
    return [-(-count // multiple) * multiple for count in counts]


def _row_multiple(rows: Tensor) -> int:
    return _ROW_MULTIPLE if rows.device.type == "cpu" and rows.dtype == torch.bfloat16 else 1


def _nonempty(
    counts: list[int], *whole: Tensor | Sequence[Tensor]
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """(expert, its part of each tensor), for experts that have rows."""
    split = (torch.split(t, counts) if isinstance(t, Tensor) else t for t in whole)
    for i, (count, *parts) in enumerate(zip(counts, *split, strict=True)):
        if count:
            yield i, tuple(parts)


def _filled(rows: Tensor, num_rows: int) -> Tensor:
    """The rows, and rows of zeros behind them."""
    if rows.shape[0] == num_rows:
        return rows
    filled = rows.new_empty(num_rows, rows.shape[1])
    filled[: rows.shape[0]] = rows
    filled[rows.shape[0] :] = 0.0
    return filled


def _product(rows: Tensor, matrix: Tensor, *, into: Tensor) -> None:
    """rows @ matrix, its first rows into `into`."""
    if rows.shape[0] == into.shape[0]:
        torch.mm(rows, matrix, out=into)
    else:
        into.copy_((rows @ matrix)[: into.shape[0]])


def _swiglu_again(gate_up: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """swiglu(gate_up) and the gradient of `gate_up`, with silu(gate) computed once.

    `grad_output` is overwritten.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    grad = torch.empty_like(gate_up)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    silu = torch.nn.functional.silu(gate)
    torch.mul(grad_output, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_output.mul_(up), gate, grad_input=grad_gate)
    return silu.mul_(up), grad
