"""A mixture-of-experts feed-forward part: stands where the dense one stands in a layer.

    y = sum over chosen experts i of weight_i E_i(x)   (+ shared experts, which every token sees)

The parts come from `moe`; here they meet megatron. The router is whole on every rank. Experts are
spread over the expert-parallel ranks, whole each, and marked so that megatron sums their gradients
over the ranks that hold the same ones only. Losses are sums over tokens and gradients are divided
once by the global batch's tokens, so both kinds need no factor.

Tensor-parallel ranks each route their own tokens, those that sequence parallelism gives them.
Padding is not routed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_ext.batch import PackedDocuments
from megatron_ext.mlp import SwiGLUMLP
from megatron_ext.moe_config import MoEConfig
from megatron_ext.moe_router import Router
from megatron_ext.norm import ReorderedNorm
from megatron_ext.token_dispatcher import choose_dispatcher
from moe.dispatch.hierarchical import NodeGroups
from moe.records import Routing
from moe.schedule.serial import ExpertPath, SerialExperts


class PackedTransformerLayer(TransformerLayer):
    """A layer whose feed-forward part is told which rows are padding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # `padding_mask` is the one argument that megatron hands through to the feed-forward part,
        # also when that is computed again later, with other micro-batches run in between.
        return super().forward(*args, **kwargs | {"padding_mask": kwargs.get("packed_seq_params")})


class Experts(nn.Module):
    """This rank's experts of one layer.

    Attributes:
        linear_fc1: [num_local_experts, 2 * ffn_size, hidden_size], gate first.
        linear_fc2: [num_local_experts, hidden_size, ffn_size].
    """

    def __init__(self, config: TransformerConfig, moe: MoEConfig) -> None:
        super().__init__()
        assert moe.num_moe_experts is not None
        assert config.moe_ffn_hidden_size is not None
        num_local = moe.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        hidden_size, ffn_size = config.hidden_size, config.moe_ffn_hidden_size
        self.linear_fc1 = nn.Parameter(_empty(config, num_local, 2 * ffn_size, hidden_size))
        self.linear_fc2 = nn.Parameter(_empty(config, num_local, hidden_size, ffn_size))
        for weight in self.parameters():
            # megatron's marks: reduced over the expert-data ranks, and no copy of what other
            # tensor-parallel ranks hold, so that each counts in the norm of the gradient.
            for name, value in (
                ("allreduce", False),
                ("tensor_model_parallel", True),
                ("partition_dim", 0),
                ("partition_stride", 1),
            ):
                setattr(weight, name, value)

    def forward(self, tokens: Tensor, routing: Routing, path: ExpertPath) -> Tensor:
        # A call of this module, whatever the path: megatron may have yet to gather its weights.
        return path(tokens, routing, self.linear_fc1, self.linear_fc2)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """All experts of the layer as one tensor, so that any number of ranks can read them."""
        expert_rank = parallel_state.get_expert_model_parallel_rank()
        expert_size = parallel_state.get_expert_model_parallel_world_size()
        replica = parallel_state.get_expert_data_parallel_rank()
        num_leading = len(sharded_offsets)
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                weight,
                *sharded_offsets,
                (num_leading, expert_rank, expert_size),
                replica_id=(0, 0, replica),
                prepend_axis_num=num_leading,
            )
            for name, weight in self.named_parameters()
        }


class MoEMLP(MegatronModule):
    """Router, experts and what brings tokens from one to the other."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        moe: MoEConfig,
        node_groups: NodeGroups | None = None,
    ) -> None:
        """node_groups: how the expert-parallel group lies on nodes (see `Mesh`)."""
        super().__init__(config=config)
        self.router = Router(config, moe)
        self.experts = Experts(config, moe)
        self.shared_experts: SwiGLUMLP | None = None
        if moe.moe_shared_expert_intermediate_size is not None:
            # Its second linear map asks the configuration how wide it is.
            narrower = copy.copy(config)
            narrower.ffn_hidden_size = moe.moe_shared_expert_intermediate_size
            self.shared_experts = SwiGLUMLP(
                narrower, submodules, ffn_hidden_size=narrower.ffn_hidden_size
            )
        self.dispatcher = choose_dispatcher(
            moe,
            group=parallel_state.get_expert_model_parallel_group(),
            node_groups=node_groups,
        )
        self.node_groups = node_groups
        self.exact: ExpertPath = SerialExperts(self.dispatcher)
        """Dispatch, experts and combine; in chunks if `expert_schedule` says so."""
        self.compressed: ExpertPath | None = None
        """The way to take in training, if another; `expert_compression` puts it here."""

    def forward(
        self, hidden_states: Tensor, padding_mask: PackedDocuments | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [num_rows, 1, hidden_size], this rank's part of the row.

        padding_mask: the documents of the row (see `PackedTransformerLayer`).
        """
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens = rows[: self._num_tokens(rows.shape[0], padding_mask)]
        routing = self.router(tokens, padding_mask)
        compressed = self.compressed if self.training else None
        routed = self.experts(tokens, routing, compressed or self.exact)
        num_padding = rows.shape[0] - tokens.shape[0]
        output = nn.functional.pad(routed, (0, 0, 0, num_padding)).view_as(hidden_states)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)[0]
        return output, None

    def _num_tokens(self, num_rows: int, documents: PackedDocuments | None) -> int:
        """Rows before the padding, which stands at the end of the whole row."""
        if documents is None or documents.rows is None:
            return num_rows
        first: int = num_rows * parallel_state.get_tensor_model_parallel_rank()
        return min(max(documents.rows.num_rows - first, 0), num_rows)


class ReorderedNormMoEMLP(ReorderedNorm, MoEMLP):
    """Experts whose output is normalised before the residual sum (OLMo 2, section 3.1)."""


def _empty(config: TransformerConfig, *shape: int | None) -> Tensor:
    """`init_parameters` fills it."""
    return torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())  # type: ignore[arg-type]
