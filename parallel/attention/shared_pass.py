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
from parallel.attention.ring import TravellingBlocks, TravellingGradients
from parallel.attention.shared_rows import SharedRows, UlyssesRows
from parallel.attention.ulysses import HeadExchange
from parallel.comm.exchange import Exchange, Round


@dataclass(frozen=True, slots=True)
class SavedHeads:
    """What backward needs of a ring that exchanged heads: this rank's heads of all its tokens."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    log_sum_exp: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.output, self.log_sum_exp


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
        # In float32 the parts are merged in the output itself.
        merged = output[shared]
        if merged.dtype != precision:
            merged = torch.empty_like(merged, dtype=precision)
        merged_log_sum_exp = log_sum_exp[:, shared]
        own = query[shared], key[shared], value[shared]

        blocks = TravellingBlocks(own[1], own[2], rows, self.exchange)
        exchanges = self._head_exchanges("to heads")
        messages = blocks.messages(1)
        for ring, heads in zip(rows.ulysses, exchanges, strict=True):
            messages += heads.to_heads([x[ring.own] for x in own])
        under_way = self.exchange.post(messages)
        self.kernels.documents_forward(output, log_sum_exp, query, key, value, rows.whole)
        for documents in rows.own:
            self.kernels.documents_forward(merged, merged_log_sum_exp, *own, documents)
        under_way.wait()
        under_way = self.exchange.post(blocks.messages(2))
        saved = tuple(
            self._heads_forward(ring, *heads.heads())
            for ring, heads in zip(rows.ulysses, exchanges, strict=True)
        )
        returning, back = self._post_to_rows([[heads.output] for heads in saved])
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
        for ring, heads in zip(rows.ulysses, returning, strict=True):
            heads.rows([merged[ring.own]])
        if merged.dtype != output.dtype:
            output[shared] = merged
        return Answer(output, log_sum_exp, saved)

    def backward(
        self, attended: Attended, key: Tensor, value: Tensor, saved: tuple[SavedHeads, ...]
    ) -> Gradients:
        """Gradients of query, key and value in their dtype, zero behind the last row.

        attended: all rows, output and log-sum-exp as `forward` gave them; saved: likewise.
        """
        rows, shared = self.rows, self.rows.shared
        gradients = _empty(attended.query, key, value)
        for gradient in gradients:
            gradient[rows.num_whole :] = 0
        sums = _zero_sums(gradients, shared)
        own = attended.rows(shared)
        own_key, own_value = key[shared], value[shared]

        blocks = TravellingBlocks(own_key, own_value, rows, self.exchange)
        travelling = TravellingGradients((sums[1], sums[2]), rows, self.exchange)
        exchanges = self._head_exchanges("to heads")
        messages = blocks.messages(1)
        for ring, heads in zip(rows.ulysses, exchanges, strict=True):
            messages += heads.to_heads([own.grad_output[ring.own]])
        under_way = self.exchange.post(messages)
        self.kernels.documents_backward(gradients, attended, key, value, rows.whole)
        first, rest = self._portions(num_heads=own.query.shape[1], num_groups=key.shape[1])
        self._own_backward(sums, own, own_key, own_value, first)
        under_way.wait()
        under_way = self.exchange.post(blocks.messages(2))
        returning, back = self._post_to_rows(
            [
                self._heads_backward(ring, heads.heads()[0], kept)
                for ring, heads, kept in zip(rows.ulysses, exchanges, saved, strict=True)
            ]
        )
        for step, rectangles in enumerate(rows.rectangles, start=1):
            if step > 1:
                under_way.wait()
                travelling.absorb(step - 1)
                under_way = self.exchange.post(
                    blocks.messages(step + 1) + travelling.messages(step)
                )
            keys, values = blocks.here(step)
            self.kernels.rectangles_backward(
                (sums[0], *travelling.cleared(step)), own, keys, values, rectangles
            )
        self._own_backward(sums, own, own_key, own_value, rest)
        under_way.wait()
        travelling.absorb(len(rows.steps))
        back.wait()
        for ring, heads in zip(rows.ulysses, returning, strict=True):
            heads.rows([total[ring.own] for total in sums])
        if sums[0].dtype != gradients[0].dtype:
            for gradient, total in zip(gradients, sums, strict=True):
                gradient[shared] = total
        return gradients

    def _portions(
        self, *, num_heads: int, num_groups: int
    ) -> tuple[list[tuple[slice, slice]], list[tuple[slice, slice]]]:
        """(query heads, groups) of the own rows' backward before the first hop and after the last.

        Something has to be computed while the first keys come and while the last gradients, twice
        as many bytes or more, go home. Whole documents do for the first; without any, a third of
        the groups (or, if there is one only, of its heads).
        """
        everything = slice(0, num_heads), slice(0, num_groups)
        if self.rows.num_whole or num_heads == 1:
            return [], [everything]
        if num_groups > 1:
            cut = max(1, num_groups // 3)
            heads = cut * (num_heads // num_groups)
            first = slice(0, heads), slice(0, cut)
            return [first], [(slice(heads, num_heads), slice(cut, num_groups))]
        heads = max(1, num_heads // 3)
        return [(slice(0, heads), everything[1])], [(slice(heads, num_heads), everything[1])]

    def _own_backward(
        self,
        sums: Gradients,
        own: Attended,
        key: Tensor,
        value: Tensor,
        portions: list[tuple[slice, slice]],
    ) -> None:
        for heads, groups in portions:
            part = sums[0][:, heads], sums[1][:, groups], sums[2][:, groups]
            for documents in self.rows.own:
                self.kernels.documents_backward(
                    part, own.heads(heads), key[:, groups], value[:, groups], documents
                )

    def _heads_forward(
        self, ring: UlyssesRows, query: Tensor, key: Tensor, value: Tensor
    ) -> SavedHeads:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        log_sum_exp = query.new_empty(
            (query.shape[1], query.shape[0]), dtype=torch.promote_types(query.dtype, torch.float32)
        )
        self.kernels.documents_forward(output, log_sum_exp, query, key, value, ring.documents)
        return SavedHeads(query, key, value, output, log_sum_exp)

    def _heads_backward(self, ring: UlyssesRows, grad: Tensor, saved: SavedHeads) -> list[Tensor]:
        gradients = _empty(saved.query, saved.key, saved.value)
        attended = Attended(grad, saved.query, saved.output, saved.log_sum_exp)
        self.kernels.documents_backward(gradients, attended, saved.key, saved.value, ring.documents)
        return list(gradients)

    def _head_exchanges(self, name: str) -> list[HeadExchange]:
        return [
            HeadExchange(ring, self.exchange, name=f"{name} {number}")
            for number, ring in enumerate(self.rows.ulysses)
        ]

    def _post_to_rows(self, tensors: list[list[Tensor]]) -> tuple[list[HeadExchange], Round]:
        """Send what was computed of heads back to the rows' ranks; tensors of each ring."""
        exchanges = self._head_exchanges("to rows")
        messages = [
            message
            for heads, of_ring in zip(exchanges, tensors, strict=True)
            for message in heads.to_rows(of_ring)
        ]
        return exchanges, self.exchange.post(messages)


def _empty(query: Tensor, key: Tensor, value: Tensor) -> Gradients:
    query, key, value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    return query, key, value


def _zero_sums(gradients: Gradients, shared: slice) -> Gradients:
    """Zeros for the shared rows, at least float32: where that is the dtype, the rows themselves."""
    precision = torch.promote_types(gradients[0].dtype, torch.float32)
    if gradients[0].dtype == precision:
        return gradients[0][shared], gradients[1][shared], gradients[2][shared]
    query, key, value = (torch.zeros_like(x[shared], dtype=precision) for x in gradients)
    return query, key, value
