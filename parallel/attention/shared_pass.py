"""Forward and backward of one layer's attention over a row that holds shared sequences.

Forward merges the parts over the blocks of keys that come by. Backward computes each block's
probabilities from the log-sum-exp over all keys. While a block is computed, the next one is under
way; while the first comes, the whole documents and this rank's own rows are computed; in backward
the last gradients go home while the own rows are.

What is in which round, for the labels of `parallel.comm.exchange`: round r = 1, 2, .. brings the
blocks of step r and, in backward, the gradients of step r - 1. It is posted before step r - 1 is
computed and awaited after it. Heads that are exchanged come in round 1 and go back in a round of
their own between 2 and 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.attention.block import Attended, BlockKernels, Gradients
from parallel.attention.heads_pass import (
    HeadsBackward,
    HeadsForward,
    SavedHeads,
    empty_gradients,
)
from parallel.attention.ring import TravellingBlocks, TravellingGradients
from parallel.attention.shared_rows import SharedRows
from parallel.comm.exchange import Exchange

Portion = tuple[slice, slice]
"""Some query heads and the groups they read."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What forward found."""

    output: Tensor
    """In query's dtype, with zeros behind the last row."""
    log_sum_exp: Tensor
    """[num_heads, num_rows], at least float32."""
    heads: tuple[SavedHeads, ...]
    """For each ring that exchanges heads."""


@dataclass(frozen=True, slots=True)
class SharedPass:
    """The pass over one micro-batch's rows; shapes as in `packed_attention`."""

    rows: SharedRows
    exchange: Exchange
    kernels: BlockKernels

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Answer:
        rows, shared = self.rows, self.rows.shared
        precision = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        output[rows.num_rows :] = 0
        log_sum_exp = query.new_empty((query.shape[1], rows.num_rows), dtype=precision)
        merged, merged_log_sum_exp = output[shared], log_sum_exp[:, shared]
        if merged.dtype != precision:
            merged = torch.empty_like(merged, dtype=precision)
        own = query[shared], key[shared], value[shared]

        blocks = TravellingBlocks(own[1], own[2], rows, self.exchange)
        heads = HeadsForward(rows.ulysses, self.exchange, self.kernels)
        under_way = self.exchange.post(blocks.messages(1) + heads.outgoing(*own))
        self.kernels.documents_forward(output, log_sum_exp, query, key, value, rows.whole)
        for documents in rows.own:
            self.kernels.documents_forward(merged, merged_log_sum_exp, *own, documents)
        under_way.wait()
        under_way = self.exchange.post(blocks.messages(2))
        back = self.exchange.post(heads.computed())
        for step, rectangles in enumerate(rows.rectangles, start=1):
            if step > 1:
                under_way.wait()
                under_way = self.exchange.post(blocks.messages(step + 1))
            keys, values = blocks.here(step)
            self.kernels.rectangles_forward(
                merged, merged_log_sum_exp, own[0], keys, values, rectangles
            )
        under_way.wait()
        back.wait()
        heads.finish(merged)
        if merged.dtype != output.dtype:
            output[shared] = merged
        return Answer(output, log_sum_exp, heads.saved)

    def backward(
        self, attended: Attended, key: Tensor, value: Tensor, saved: tuple[SavedHeads, ...]
    ) -> Gradients:
        """Gradients of query, key and value in their dtype, zero behind the last row.

        attended: all rows, output and log-sum-exp as `forward` gave them; saved: likewise. Of rows
        whose heads are exchanged, where no ring goes round, query, key and value may be missing.
        """
        rows, shared = self.rows, self.rows.shared
        num_tokens = attended.grad_output.shape[0]
        gradients = empty_gradients(attended.query, key, value, num_tokens=num_tokens)
        sums = _zero_sums(gradients, rows)
        own, own_key, own_value = attended.rows(shared), key[shared], value[shared]

        blocks = TravellingBlocks(own_key, own_value, rows, self.exchange)
        travelling = TravellingGradients((sums[1], sums[2]), rows, self.exchange)
        heads = HeadsBackward(rows.ulysses, self.exchange, self.kernels, saved)
        under_way = self.exchange.post(blocks.messages(1) + heads.outgoing(own.grad_output))
        self.kernels.documents_backward(gradients, attended, key, value, rows.whole)
        first, rest = self._portions(num_heads=own.query.shape[1], num_groups=key.shape[1])
        self._own_backward(sums, own, own_key, own_value, first)
        under_way.wait()
        under_way = self.exchange.post(blocks.messages(2))
        back = self.exchange.post(heads.computed())
        for step, rectangles in enumerate(rows.rectangles, start=1):
            if step > 1:
                under_way.wait()
                travelling.absorb(step - 1)
                messages = blocks.messages(step + 1) + travelling.messages(step)
                under_way = self.exchange.post(messages)
            keys, values = blocks.here(step)
            self.kernels.rectangles_backward(
                (sums[0], *travelling.cleared(step)), own, keys, values, rectangles
            )
        self._own_backward(sums, own, own_key, own_value, rest)
        under_way.wait()
        travelling.absorb(len(rows.steps))
        back.wait()
        heads.finish(sums)
        if sums[0].dtype != gradients[0].dtype:
            for gradient, total in zip(gradients, sums, strict=True):
                gradient[shared] = total
        return gradients

    def _portions(self, *, num_heads: int, num_groups: int) -> tuple[list[Portion], list[Portion]]:
        """What of the own rows' backward comes before the first hop, and what after the last.

        Something has to be computed while the first keys come and while the last gradients, twice
        as many bytes or more, go home. Whole documents do for the first; without any, a third of
        the groups (or, if there is one only, of its heads).
        """
        every_group = slice(0, num_groups)
        if self.rows.num_whole or num_heads == 1:
            return [], [(slice(0, num_heads), every_group)]
        if num_groups == 1:
            cut = max(1, num_heads // 3)
            return [(slice(0, cut), every_group)], [(slice(cut, num_heads), every_group)]
        cut = max(1, num_groups // 3)
        heads = cut * (num_heads // num_groups)
        rest = slice(heads, num_heads), slice(cut, num_groups)
        return [(slice(0, heads), slice(0, cut))], [rest]

    def _own_backward(
        self,
        sums: Gradients,
        own: Attended,
        key: Tensor,
        value: Tensor,
        portions: list[Portion],
    ) -> None:
        for heads, groups in portions:
            part = sums[0][:, heads], sums[1][:, groups], sums[2][:, groups]
            for documents in self.rows.own:
                self.kernels.documents_backward(
                    part, own.heads(heads), key[:, groups], value[:, groups], documents
                )


def _zero_sums(gradients: Gradients, rows: SharedRows) -> Gradients:
    """Zeros for the shared rows, at least float32: where that is the dtype, the rows themselves.

    Clears what lies behind the whole documents, too.
    """
    for gradient in gradients:
        gradient[rows.num_whole :] = 0
    precision = torch.promote_types(gradients[0].dtype, torch.float32)
    query, key, value = (x[rows.shared] for x in gradients)
    if query.dtype != precision:
        query, key, value = (torch.zeros_like(x, dtype=precision) for x in (query, key, value))
    return query, key, value
