"""Blocks of a ring pass one by one, each with the kernel that fits: the CPU's way.

| kernel        | computes a block by                             |
|---------------|-------------------------------------------------|
| `torch_flash` | torch's flash kernel for the CPU                |
| `blocked`     | batched matrix products, on any device          |
| `reference`   | the formula, on any device                      |
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from parallel.attention.block import Attended, Gradients
from parallel.attention.cpu_flash import by_group, flash_block, flash_block_backward
from parallel.attention.merge import merge_reference
from parallel.attention.reference import reference_block, reference_block_backward
from parallel.attention.shared_rows import Documents, Rectangles

LoopKernel = Literal["per_document", "torch_flash", "reference"]


class _Forward(Protocol):
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float, is_causal: bool
    ) -> tuple[Tensor, Tensor]: ...


class _Backward(Protocol):
    def __call__(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        *,
        softmax_scale: float,
        is_causal: bool,
    ) -> Gradients: ...


@dataclass(frozen=True, slots=True)
class LoopBlocks:
    """`BlockKernels`, one block after the other."""

    kernel: LoopKernel
    softmax_scale: float

    def documents_forward(
        self,
        output: Tensor,
        log_sum_exp: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents,
    ) -> None:
        for start, end in documents.ranges:
            rows = slice(start, end)
            forward, _ = self._kernel(end - start, end - start, query.dtype)
            part, part_log_sum_exp = forward(
                query[rows],
                key[rows],
                value[rows],
                softmax_scale=self.softmax_scale,
                is_causal=True,
            )
            num_groups = key.shape[1]
            by_group(output[rows], num_groups).copy_(part)
            _lse_by_group(log_sum_exp[:, rows], num_groups).copy_(part_log_sum_exp)

    def documents_backward(
        self,
        gradients: Gradients,
        attended: Attended,
        key: Tensor,
        value: Tensor,
        documents: Documents,
    ) -> None:
        for start, end in documents.ranges:
            rows = slice(start, end)
            self._backward(
                gradients,
                attended,
                key,
                value,
                queries=rows,
                keys=rows,
                is_causal=True,
                is_complete=documents.is_complete,
            )

    def rectangles_forward(
        self,
        output: Tensor,
        log_sum_exp: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rectangles: Rectangles,
    ) -> None:
        for block in rectangles.blocks:
            forward, _ = self._kernel(block.num_queries, block.num_keys, query.dtype)
            part, part_log_sum_exp = forward(
                query[block.queries],
                key[block.keys],
                value[block.keys],
                softmax_scale=self.softmax_scale,
                is_causal=False,
            )
            num_groups = key.shape[1]
            merge_reference(
                by_group(output[block.queries], num_groups),
                _lse_by_group(log_sum_exp[:, block.queries], num_groups),
                part,
                part_log_sum_exp,
            )

    def rectangles_backward(
        self,
        gradients: Gradients,
        attended: Attended,
        key: Tensor,
        value: Tensor,
        rectangles: Rectangles,
    ) -> None:
        for block in rectangles.blocks:
            self._backward(
                gradients,
                attended,
                key,
                value,
                queries=block.queries,
                keys=block.keys,
                is_causal=False,
                is_complete=False,
            )

    def _backward(
        self,
        gradients: Gradients,
        attended: Attended,
        key: Tensor,
        value: Tensor,
        *,
        queries: slice,
        keys: slice,
        is_causal: bool,
        is_complete: bool,
    ) -> None:
        num_groups = key.shape[1]
        known = attended.rows(queries)
        _, backward = self._kernel(queries.stop - queries.start, keys.stop - keys.start, key.dtype)
        shares = backward(
            known.grad_output,
            known.query,
            key[keys],
            value[keys],
            known.output,
            _lse_by_group(known.log_sum_exp, num_groups),
            softmax_scale=self.softmax_scale,
            is_causal=is_causal,
        )
        targets = (
            by_group(gradients[0][queries], num_groups),
            gradients[1][keys],
            gradients[2][keys],
        )
        for target, share in zip(targets, shares, strict=True):
            if is_complete:
                target.copy_(share)
            else:
                target += share

    def _kernel(
        self, num_queries: int, num_keys: int, dtype: torch.dtype
    ) -> tuple[_Forward, _Backward]:
        """The fastest for a block of this size, or the one that was asked for."""
        if self.kernel == "reference":
            return reference_block, reference_block_backward
        return flash_block, flash_block_backward


def _lse_by_group(log_sum_exp: Tensor, num_groups: int) -> Tensor:
    """View [num_heads, n] as [num_query_groups, heads_per_group, n]."""
    num_heads, length = log_sum_exp.shape
    return log_sum_exp.view(num_groups, num_heads // num_groups, length)
