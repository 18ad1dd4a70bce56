"""Where documents begin and end in a packed row of tokens.

A micro-batch is one row of tokens, [num_tokens, ...], into which whole documents are packed one
behind the other. `cu_seqlens` (cumulative lengths: 0, L0, L0 + L1, ...) says where each begins;
what lies behind its last entry is padding and belongs to no document.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

CuSeqlens = Tensor | Sequence[int]


def host_cu_seqlens(cu_seqlens: CuSeqlens) -> tuple[int, ...]:
    """The boundaries as Python integers. A tensor on an accelerator costs one device sync."""
    if isinstance(cu_seqlens, Tensor):
        return tuple(cu_seqlens.tolist())
    return tuple(cu_seqlens)


def document_ranges(cu_seqlens: CuSeqlens, *, num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Half-open token ranges of the documents that have at least one token.

    Raises ValueError unless the boundaries start at 0, never fall and end within `num_tokens`.
    """
    bounds = host_cu_seqlens(cu_seqlens)
    if not bounds or bounds[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0, found {list(bounds[:4])}")
    ranges = tuple(pairwise(bounds))
    for document, (start, end) in enumerate(ranges):
        if end < start:
            raise ValueError(f"cu_seqlens falls from {start} to {end} at document {document}")
    if bounds[-1] > num_tokens:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}, but there are {num_tokens} tokens")
    return tuple((start, end) for start, end in ranges if end > start)


def inner_contiguous(x: Tensor) -> Tensor:
    """x with channels side by side, as all kernels want them; copied only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def zeros_in_graph(x: Tensor) -> Tensor:
    """Zeros of x's shape whose gradient for x is 0, even where x or the gradient is NaN.

    An empty micro-batch needs this: its output must reach back to the parameters.
    """
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)
