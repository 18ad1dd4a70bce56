"""What a ring pass asks of its kernels, and which kernels answer.

A rank's attention over shared sequences is made of blocks: documents that see themselves causally,
and rectangles of queries that see all of some keys. Kernels give log-sum-exps, so that parts over
different keys can be merged, and take the merged ones in backward: with the output and log-sum-exp
over all keys, each block's gradients are its share of the whole and add up.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from parallel.attention.shared_rows import Documents, Rectangles

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of query, key and value."""


@dataclass(frozen=True, slots=True)
class Attended:
    """What backward knows of some rows of queries."""

    grad_output: Tensor
    query: Tensor
    output: Tensor
    """Over all keys; these three [rows, num_heads, head_dim]."""
    log_sum_exp: Tensor
    """Over all keys, [num_heads, rows], at least float32."""

    def rows(self, rows: slice) -> "Attended":
        return Attended(
            self.grad_output[rows], self.query[rows], self.output[rows], self.log_sum_exp[:, rows]
        )

    def heads(self, heads: slice) -> "Attended":
        return Attended(
            self.grad_output[:, heads],
            self.query[:, heads],
            self.output[:, heads],
            self.log_sum_exp[heads],
        )


class BlockKernels(Protocol):
    """query, output and their gradients: [rows, num_heads, head_dim]; key, value and theirs:
    [rows, num_query_groups, head_dim]; log_sum_exp: [num_heads, rows], at least float32. The last
    stride of each is 1."""

    def documents_forward(
        self,
        output: Tensor,
        log_sum_exp: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents,
    ) -> None:
        """Write the documents' rows of `output` and `log_sum_exp`; leave others alone.

        The log-sum-exp of documents that are complete is for `documents_backward` alone, and a
        kernel whose backward does without it need not write it.
        """

    def documents_backward(
        self,
        gradients: Gradients,
        attended: Attended,
        key: Tensor,
        value: Tensor,
        documents: Documents,
    ) -> None:
        """Write the documents' rows of `gradients`; add to them where they are not complete."""

    def rectangles_forward(
        self,
        output: Tensor,
        log_sum_exp: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rectangles: Rectangles,
    ) -> None:
        """Merge what the queries see in these keys into `output` (at least float32)."""

    def rectangles_backward(
        self,
        gradients: Gradients,
        attended: Attended,
        key: Tensor,
        value: Tensor,
        rectangles: Rectangles,
    ) -> None:
        """Add the rectangles' share to `gradients` (at least float32)."""
