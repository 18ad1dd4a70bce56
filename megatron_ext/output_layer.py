"""The last layer of the model hands on its input: the loss multiplies by the weight itself, a chunk
of tokens at a time (`linear_cross_entropy`), so that a row's logits never exist at once.
"""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


class OutputLayer(ColumnParallelLinear):
    """megatron's output layer without its product; weight, names and checkpoints are the same."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """The hidden states of all tokens, on each tensor-parallel rank.

        Each rank's columns of the vocabulary give a part of their gradient; backward sums the parts
        over the ranks, and under sequence parallelism leaves each rank its own tokens.

        Args:
            input_: [num_tokens, 1, hidden_size]; under sequence parallelism this rank's tokens.
            weight, runtime_gather_output: what megatron passes; not needed.

        Returns:
            ([num_tokens, 1, hidden_size], no bias).
        """
        if self.tp_group.size() == 1:
            return input_, None
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group), None
        return copy_to_tensor_model_parallel_region(input_, group=self.tp_group), None
