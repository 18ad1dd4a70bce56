"""Blocks of a ring pass one by one, each with the kernel that fits: the CPU's way.

| kernel         | computes a block by                                         |
|----------------|-------------------------------------------------------------|
| `torch_flash`  | torch's flash kernel for the CPU                            |
| `blocked`      | batched matrix products, on any device                      |
| `per_document` | the faster of these two, on a CPU                           |
| `reference`    | the formula, on any device                                  |
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from parallel.attention.block import Attended, Gradients
from parallel.attention.blocked_partial import blocked_block, blocked_block_backward
from parallel.attention.cpu_flash import by_group, flash_block, flash_block_backward
from parallel.attention.merge import merge_reference
from parallel.attention.per_document import (
    document_kernels,
    documents_backward,
    documents_forward,
)
from parallel.attention.reference import reference_block, reference_block_backward
from parallel.attention.shared_rows import Documents, Rectangles
from parallel.host_cpu import cpu_has_bf16_hardware

LoopKernel = Literal["per_document", "torch_flash", "blocked", "reference"]

# The scores of a block of queries exist at once: behind this they take more memory than they save
# time.
_MAX_BLOCKED_KEYS = 8192


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
        if documents.is_complete and self.kernel == "per_document":
            self._complete_forward(output, log_sum_exp, query, key, value, documents)
            return
        forward, _ = self._functions(documents.max_seqlen, query.dtype)
        for start, end in documents.ranges:
            rows = slice(start, end)
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
        if documents.is_complete and self.kernel == "per_document":
            self._complete_backward(gradients, attended, key, value, documents)
            return
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
            forward, _ = self._functions(block.num_keys, query.dtype)
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
        _, backward = self._functions(keys.stop - keys.start, key.dtype)
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

    def _complete_forward(
        self,
        output: Tensor,
        log_sum_exp: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents,
    ) -> None:
        """As `varlen_attention` does it: where nothing is merged, faster kernels exist."""
        kernels = document_kernels(documents.ranges, query.dtype)
        found = iter(
            documents_forward(
                output,
                query,
                key,
                value,
                ranges=documents.ranges,
                kernels=kernels,
                softmax_scale=self.softmax_scale,
            )
        )
        for (start, end), kernel in zip(documents.ranges, kernels, strict=True):
            if kernel == "torch_flash":
                rows = log_sum_exp[:, start:end]
                _lse_by_group(rows, key.shape[1]).copy_(next(found))

    def _complete_backward(
        self,
        gradients: Gradients,
        attended: Attended,
        key: Tensor,
        value: Tensor,
        documents: Documents,
    ) -> None:
        kernels = document_kernels(documents.ranges, key.dtype)
        documents_backward(
            gradients,
            attended.grad_output,
            attended.query,
            key,
            value,
            output=attended.output,
            log_sum_exps=[
                _lse_by_group(attended.log_sum_exp[:, start:end], key.shape[1])
                for (start, end), kernel in zip(documents.ranges, kernels, strict=True)
                if kernel == "torch_flash"
            ],
            ranges=documents.ranges,
            kernels=kernels,
            softmax_scale=self.softmax_scale,
        )

    def _functions(self, num_keys: int, dtype: torch.dtype) -> tuple[_Forward, _Backward]:
        """The fastest for so many keys, or what was asked for."""
        if self.kernel == "reference":
            return reference_block, reference_block_backward
        has_fast_products = dtype == torch.bfloat16 and cpu_has_bf16_hardware()
        is_faster = has_fast_products and num_keys <= _MAX_BLOCKED_KEYS
        if self.kernel == "blocked" or (self.kernel == "per_document" and is_faster):
            return blocked_block, blocked_block_backward
        return flash_block, flash_block_backward


def _lse_by_group(log_sum_exp: Tensor, num_groups: int) -> Tensor:
    """View [num_heads, n] as [num_query_groups, heads_per_group, n]."""
    num_heads, length = log_sum_exp.shape
    return log_sum_exp.view(num_groups, num_heads // num_groups, length)
