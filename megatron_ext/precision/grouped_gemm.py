"""Products of all experts of a rank by whichever backend can; `gemm.py` for one product."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from megatron_ext.precision.backend import choose, implementation
from megatron_ext.precision.grouped_quantized import GroupedQuantized
from megatron_ext.precision.linear_recipe import BackendName


def grouped_multiply(
    left: GroupedQuantized,
    right: GroupedQuantized,
    starts: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    alignment: int = 1,
    backend: BackendName = "auto",
) -> Tensor:
    """One product for each expert.

        rows      out[t] = left[t] right[e]^T       t in [starts[e], starts[e + 1])
        columns   out[e] = left[:, t] right[:, t]^T over those t

    Args:
        left, right: `rows` [T, K] and `stacked` [E, N, K], or both `columns`, [M, T] and [N, T].
        starts: int64 [E + 1], rising, on the device.
        out_dtype: of the result, rounded once from float32.
        out: float32, of the result's shape, that products are added to.
        alignment: the caller's word that every start is a multiple of it (`columns`).
        backend: who computes.

    Returns:
        [T, N] or [E, M, N].

    Raises:
        UserError: the backend cannot multiply these formats here.
    """
    formats = left.block_format, right.block_format
    name = choose(backend, "grouped_multiply", formats, left.codes.device)
    run = implementation(name, "grouped_multiply")
    product = run(left, right, starts, out_dtype=out_dtype, out=out, alignment=alignment)
    return cast(Tensor, product)
