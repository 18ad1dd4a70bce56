"""The attention of one layer: rotary positions, then causal attention inside each document.

Stands where megatron's `core_attention` stands. It gets queries, keys and values of a packed row
and hands them to `parallel.attention`, which knows the kernels.
"""

from __future__ import annotations

import math
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ext.batch import PackedDocuments
from megatron_ext.norm import ReorderedNorm
from parallel.attention.packed import packed_attention
from parallel.attention.rotary import apply_rotary


class PackedCoreAttention(nn.Module):
    """Causal attention over packed documents; megatron builds it through a `ModuleSpec`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedDocuments | None = None,
    ) -> Tensor:
        """query: [num_tokens, heads, head_dim]; key, value: [num_tokens, groups, head_dim].

        Returns: [num_tokens, heads * head_dim]; rows of padding are zero.
        """
        assert packed_seq_params is not None, "every batch is packed"
        documents = packed_seq_params
        assert documents.rotary is not None
        query = apply_rotary(query, table=documents.rotary)
        key = apply_rotary(key, table=documents.rotary)
        assert documents.rows is not None
        output = packed_attention(
            query,
            key,
            value,
            rows=documents.rows,
            exchange=documents.exchange,
            softmax_scale=self.softmax_scale,
        )
        if documents.rows.num_rows == 0:
            # An empty micro-batch: every weight gets its (zero) gradient, or the reduction of
            # gradients would wait for it.
            output = output + 0.0 * (key.sum() + value.sum())
        return output.reshape(output.shape[0], -1)


class ReorderedNormSelfAttention(ReorderedNorm, SelfAttention):
    """Self-attention whose output is normalised before the residual sum (OLMo 2, section 3.1)."""
