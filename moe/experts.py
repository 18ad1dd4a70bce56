"""The experts of one rank: SwiGLU feed-forward networks of one shape, each over its own rows.

    rows of expert i:  y = W2_i (silu(G_i x) * U_i x),   [G_i; U_i] = W1_i

The weights of all experts stand in one tensor, the rows expert by expert. Two ways to multiply: one
product after another, which runs anywhere and is the reference, and torch's grouped product, one
kernel for all experts. Where there is no such kernel `moe.expert_loop` does the same as the loop,
faster. An expert with no rows gets gradient 0 like any other weight, or the reduction of gradients
would wait for it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moe.expert_loop import expert_loop
from moe.swiglu import swiglu

GroupedLinear = Literal["auto", "loop", "torch"]
# torch's kernel reads rows in steps of this many bytes.
_ALIGNMENT_BYTES = 16


def run_experts(
    rows: Tensor,
    counts: Tensor,
    linear_fc1: Tensor,
    linear_fc2: Tensor,
    *,
    backend: GroupedLinear = "auto",
) -> Tensor:
    """Each row through its expert.

    Args:
        rows: [num_rows, hidden_size], those of the first expert first.
        counts: int64 [num_experts], rows of each expert; 0 is fine.
        linear_fc1: [num_experts, 2 * ffn_size, hidden_size], gate first.
        linear_fc2: [num_experts, hidden_size, ffn_size].
        backend: as in `grouped_linear`; "auto" without that kernel takes `expert_loop`.

    Returns:
        [num_rows, hidden_size].
    """
    if backend == "auto" and not _has_kernel(rows, linear_fc1):
        return expert_loop(rows, linear_fc1, linear_fc2, counts=counts.tolist())
    gate_up = grouped_linear(rows, linear_fc1, counts, backend=backend)
    return grouped_linear(swiglu(gate_up), linear_fc2, counts, backend=backend)


def grouped_linear(
    rows: Tensor, weight: Tensor, counts: Tensor, *, backend: GroupedLinear = "auto"
) -> Tensor:
    """rows of expert i times weight[i]^T.

    Args:
        rows: [num_rows, in_size].
        weight: [num_experts, out_size, in_size].
        counts: int64 [num_experts]; they sum to num_rows.
        backend: "loop"; "torch" (`torch._grouped_mm`); "auto" takes the grouped product where it
            is one kernel, which it is not on a CPU.

    Returns:
        [num_rows, out_size].

    Raises:
        ValueError: "torch" was asked for and cannot run here.
    """
    if backend == "auto":
        backend = "torch" if _has_kernel(rows, weight) else "loop"
    if backend == "loop":
        return _loop(rows, weight, counts)
    if reason := why_not_grouped_mm(rows, weight):
        raise ValueError(f"torch._grouped_mm cannot run here: {reason}; use backend='loop'")
    return _grouped_mm(rows, weight, counts)


def _has_kernel(rows: Tensor, weight: Tensor) -> bool:
    return rows.is_cuda and not why_not_grouped_mm(rows, weight)


def why_not_grouped_mm(rows: Tensor, weight: Tensor) -> str:
    """Why torch's grouped product cannot be used; empty where it can."""
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} does not have it"
    if rows.dtype != torch.bfloat16:
        return f"it is for bfloat16, the rows are {rows.dtype}"
    if rows.is_cuda and torch.cuda.get_device_capability(rows.device) < (9, 0):
        return "it needs a GPU of compute capability 9.0 or newer"
    for size in weight.shape[1:]:
        if size * rows.element_size() % _ALIGNMENT_BYTES:
            return f"{size} elements of a row are no multiple of {_ALIGNMENT_BYTES} bytes"
    return ""


def _loop(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    parts = torch.split(rows, counts.tolist())
    # `unbind` puts all gradients into one tensor at once; indexing would add up one for each.
    experts = weight.unbind(0)
    return torch.cat(
        [torch.nn.functional.linear(x, w) for x, w in zip(parts, experts, strict=True)]
    )


def _grouped_mm(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    if rows.shape[0] == 0:
        # It refuses rows of no length in its backward pass.
        return _loop(rows, weight, torch.zeros_like(counts, device="cpu"))
    ends = counts.cumsum(0).to(torch.int32)
    product: Tensor = torch._grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    return product
