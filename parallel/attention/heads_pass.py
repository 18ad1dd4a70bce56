"""Rings that exchange heads, as a part of a pass: what arrives is computed and sent back.

Each direction of the pass sends (`outgoing`), computes when that has arrived and sends the results
(`computed`), and writes what came back into this rank's rows (`finish`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.attention.block import Attended, BlockKernels, Gradients
from parallel.attention.shared_rows import UlyssesRows
from parallel.attention.ulysses import HeadExchange
from parallel.comm.exchange import Exchange, Message


@dataclass(frozen=True, slots=True)
class SavedHeads:
    """What backward needs of a ring: this rank's heads of all its tokens, in sequence order."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    log_sum_exp: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.output, self.log_sum_exp


class HeadsForward:
    """The forward pass of all rings of a micro-batch that exchange heads."""

    def __init__(
        self, rings: Sequence[UlyssesRows], exchange: Exchange, kernels: BlockKernels
    ) -> None:
        self._rings, self._kernels = rings, kernels
        self._arriving = _exchanges(rings, exchange, "to heads")
        self._returning = _exchanges(rings, exchange, "to rows")
        self.saved: tuple[SavedHeads, ...] = ()

    def outgoing(self, query: Tensor, key: Tensor, value: Tensor) -> list[Message]:
        """Send the shared rows."""
        messages = []
        for ring, heads in zip(self._rings, self._arriving, strict=True):
            messages += heads.to_heads([x[ring.own] for x in (query, key, value)])
        return messages

    def computed(self) -> list[Message]:
        """Attention of this rank's heads; what goes back."""
        self.saved = tuple(
            self._attention(ring, *heads.heads())
            for ring, heads in zip(self._rings, self._arriving, strict=True)
        )
        messages = []
        for heads, saved in zip(self._returning, self.saved, strict=True):
            messages += heads.to_rows([saved.output])
        return messages

    def finish(self, output: Tensor) -> None:
        """Write the shared rows' output."""
        for ring, heads in zip(self._rings, self._returning, strict=True):
            heads.rows([output[ring.own]])

    def _attention(
        self, ring: UlyssesRows, query: Tensor, key: Tensor, value: Tensor
    ) -> SavedHeads:
        precision = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        log_sum_exp = query.new_empty((query.shape[1], query.shape[0]), dtype=precision)
        self._kernels.documents_forward(output, log_sum_exp, query, key, value, ring.documents)
        return SavedHeads(query, key, value, output, log_sum_exp)


class HeadsBackward:
    """The backward pass of the same rings; saved: as the forward pass left it."""

    def __init__(
        self,
        rings: Sequence[UlyssesRows],
        exchange: Exchange,
        kernels: BlockKernels,
        saved: Sequence[SavedHeads],
    ) -> None:
        self._rings, self._kernels, self._saved = rings, kernels, saved
        self._arriving = _exchanges(rings, exchange, "to heads")
        self._returning = _exchanges(rings, exchange, "to rows")

    def outgoing(self, grad_output: Tensor) -> list[Message]:
        """Send the shared rows' gradient of the output."""
        messages = []
        for ring, heads in zip(self._rings, self._arriving, strict=True):
            messages += heads.to_heads([grad_output[ring.own]])
        return messages

    def computed(self) -> list[Message]:
        """Gradients of this rank's heads; what goes back."""
        messages = []
        for ring, arriving, returning, saved in zip(
            self._rings, self._arriving, self._returning, self._saved, strict=True
        ):
            (grad_output,) = arriving.heads()
            attended = Attended(grad_output, saved.query, saved.output, saved.log_sum_exp)
            gradients = empty_gradients(
                saved.query, saved.key, saved.value, num_tokens=saved.query.shape[0]
            )
            self._kernels.documents_backward(
                gradients, attended, saved.key, saved.value, ring.documents
            )
            messages += returning.to_rows(gradients)
        return messages

    def finish(self, gradients: Gradients) -> None:
        """Write the shared rows' gradients."""
        for ring, heads in zip(self._rings, self._returning, strict=True):
            heads.rows([gradient[ring.own] for gradient in gradients])


def empty_gradients(query: Tensor, key: Tensor, value: Tensor, *, num_tokens: int) -> Gradients:
    """Dense memory for so many tokens."""
    query, key, value = (x.new_empty((num_tokens, *x.shape[1:])) for x in (query, key, value))
    return query, key, value


def _exchanges(
    rings: Sequence[UlyssesRows], exchange: Exchange, name: str
) -> tuple[HeadExchange, ...]:
    return tuple(
        HeadExchange(ring, exchange, name=f"{name} {number}") for number, ring in enumerate(rings)
    )
