"""megatron's column- and row-parallel linears with products of few bits.

The classes stand in every model; a layer computes in few bits once `install_low_precision` has
given it a recipe, and is megatron's own until then. Sequence parallelism gathers the tokens before
they are stored, so that blocks are those of one rank.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_ext.precision.layer_precision import FewBitLinear


class PrecisionColumnParallelLinear(ColumnParallelLinear):
    """Features out are spread over the tensor-parallel ranks."""

    low_precision: FewBitLinear | None = None

    def _forward_impl(self, input: Tensor, weight: Tensor, **others: Any) -> Tensor:
        if self.low_precision is None:
            return super()._forward_impl(input, weight, **others)  # type: ignore[no-any-return]
        if others["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(
                input, tensor_parallel_output_grad=True, group=self.tp_group
            )
        elif others["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return self.low_precision.linear(input, weight)


class PrecisionRowParallelLinear(RowParallelLinear):
    """Features in are spread over the tensor-parallel ranks; megatron sums what we return."""

    low_precision: FewBitLinear | None = None

    def _forward_impl(self, input: Tensor, weight: Tensor, **others: Any) -> Tensor:
        if self.low_precision is None:
            return super()._forward_impl(input, weight, **others)  # type: ignore[no-any-return]
        return self.low_precision.linear(input, weight)
