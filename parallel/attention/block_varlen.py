"""Blocks of a ring pass in one call of a varlen flash kernel a step: the accelerators' way.

Queries that see nothing in a step and keys that nobody sees are left out. If the others do not lie
side by side, they are gathered: a copy of linear size beside work that is quadratic.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from parallel.attention.block import Attended, Gradients
from parallel.attention.flash_attn_door import flash_attn_block, flash_attn_block_backward
from parallel.attention.merge import merge_partial
from parallel.attention.shared_rows import Documents, Rectangles, Rows
from parallel.attention.torch_flash import torch_flash_block, torch_flash_block_backward


class VarlenForward(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cu_seqlens: tuple[Tensor, Tensor],
        max_seqlens: tuple[int, int],
        softmax_scale: float,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]: ...


class VarlenBackward(Protocol):
    def __call__(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        *,
        cu_seqlens: tuple[Tensor, Tensor],
        max_seqlens: tuple[int, int],
        softmax_scale: float,
        is_causal: bool,
    ) -> Gradients: ...


@dataclass(frozen=True, slots=True)
class VarlenBlocks:
    """`BlockKernels` by kernels that take cumulative lengths of queries and keys."""

    varlen_forward: VarlenForward
    varlen_backward: VarlenBackward
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
        rows = documents.rows
        if not documents.num_tokens:
            return
        part, part_log_sum_exp = self.varlen_forward(
            query[rows],
            key[rows],
            value[rows],
            cu_seqlens=(documents.device_cu_seqlens, documents.device_cu_seqlens),
            max_seqlens=(documents.max_seqlen, documents.max_seqlen),
            softmax_scale=self.softmax_scale,
            is_causal=True,
        )
        output[rows] = part
        log_sum_exp[:, rows] = part_log_sum_exp

    def documents_backward(
        self,
        gradients: Gradients,
        attended: Attended,
        key: Tensor,
        value: Tensor,
        documents: Documents,
    ) -> None:
        rows = documents.rows
        if not documents.num_tokens:
            return
        known = attended.rows(rows)
        shares = self.varlen_backward(
            known.grad_output,
            known.query,
            key[rows],
            value[rows],
            known.output,
            known.log_sum_exp,
            cu_seqlens=(documents.device_cu_seqlens, documents.device_cu_seqlens),
            max_seqlens=(documents.max_seqlen, documents.max_seqlen),
            softmax_scale=self.softmax_scale,
            is_causal=True,
        )
        for gradient, share in zip(gradients, shares, strict=True):
            if documents.is_complete:
                gradient[rows] = share
            else:
                gradient[rows] += share

    def rectangles_forward(
        self,
        output: Tensor,
        log_sum_exp: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rectangles: Rectangles,
    ) -> None:
        if not rectangles.blocks:
            return
        part, part_log_sum_exp = self.varlen_forward(
            _gathered(query, rectangles.query_rows),
            _gathered(key, rectangles.key_rows),
            _gathered(value, rectangles.key_rows),
            cu_seqlens=(rectangles.query_cu_seqlens, rectangles.key_cu_seqlens),
            max_seqlens=(rectangles.max_queries, rectangles.max_keys),
            softmax_scale=self.softmax_scale,
            is_causal=False,
        )
        rows = rectangles.query_rows
        if isinstance(rows, slice):
            merge_partial(output[rows], log_sum_exp[:, rows], part, part_log_sum_exp)
        else:
            merge_partial(output, log_sum_exp, part, part_log_sum_exp, rows=rows)

    def rectangles_backward(
        self,
        gradients: Gradients,
        attended: Attended,
        key: Tensor,
        value: Tensor,
        rectangles: Rectangles,
    ) -> None:
        if not rectangles.blocks:
            return
        query_rows, key_rows = rectangles.query_rows, rectangles.key_rows
        log_sum_exp = attended.log_sum_exp
        shares = self.varlen_backward(
            _gathered(attended.grad_output, query_rows),
            _gathered(attended.query, query_rows),
            _gathered(key, key_rows),
            _gathered(value, key_rows),
            _gathered(attended.output, query_rows),
            _gathered(log_sum_exp.t(), query_rows).t(),
            cu_seqlens=(rectangles.query_cu_seqlens, rectangles.key_cu_seqlens),
            max_seqlens=(rectangles.max_queries, rectangles.max_keys),
            softmax_scale=self.softmax_scale,
            is_causal=False,
        )
        for gradient, share, rows in zip(
            gradients, shares, (query_rows, key_rows, key_rows), strict=True
        ):
            if isinstance(rows, slice):
                gradient[rows] += share
            else:
                # Keys that several pieces see are in there several times.
                gradient.index_add_(0, rows, share.to(gradient.dtype))


def varlen_blocks(
    kernel: Literal["torch_flash", "flash_attn"], *, softmax_scale: float
) -> VarlenBlocks:
    """The blocks of torch's own flash kernels, or of the flash-attn library's."""
    if kernel == "flash_attn":
        return VarlenBlocks(flash_attn_block, flash_attn_block_backward, softmax_scale)
    return VarlenBlocks(torch_flash_block, torch_flash_block_backward, softmax_scale)


def _gathered(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
