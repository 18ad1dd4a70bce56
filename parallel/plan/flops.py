"""How many floating-point operations a packed batch needs: the one formula for all who ask.

With N_mat the parameters that tokens are multiplied by (all linear layers and the output layer, not
the embedding look-up, norms or biases) and L_i the length of document i:

    linear     2 N_mat per token forward, twice that backward: 6 N_mat sum_i L_i
    attention  causal documents have L_i (L_i + 1) / 2 pairs of query and key. Each pair costs a
               product with key and one with value, 4 d for a head of d channels:
               forward 4 h_q pairs per layer, with h_q = num_attention_heads * kv_channels;
               backward twice that: 12 h_q num_layers sum_i L_i (L_i + 1) / 2

The attention term is a sum of squares over documents, never the square of the sum: tokens of one
document do not see another. These are *model* FLOPs, what the mathematics needs, the numerator of
MFU. A flash kernel computes the scores again in backward (2.5 times forward, not 2); recomputation
of layers adds more. Neither is progress, so neither counts here; `cost` counts the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that decide a transformer's FLOPs; names as in the configuration.

    A layer with experts counts what one token meets, not what there is.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    gated_linear_unit: bool = True
    """SwiGLU's three matrices in the feed-forward layer; two without."""
    num_moe_layers: int = 0
    """Those of num_layers that have experts."""
    moe_active_ffn_size: int = 0
    """Inner width that one token meets there: moe_router_topk * moe_ffn_hidden_size, and what is
    shared."""
    num_moe_experts: int = 0
    """Rows of a router."""

    @property
    def matmul_parameters_per_layer(self) -> int:
        """Weights of a dense layer's linear maps: query, key, value, output, feed-forward."""
        return self._attention_parameters + self._ffn_parameters(self.ffn_hidden_size)

    @property
    def matmul_parameters_per_moe_layer(self) -> int:
        """Weights that one token meets in a layer with experts, the router's too."""
        router = self.hidden_size * self.num_moe_experts
        return self._attention_parameters + self._ffn_parameters(self.moe_active_ffn_size) + router

    @property
    def matmul_parameters(self) -> int:
        """N_mat: all layers and the output layer, whether or not it shares its weights."""
        num_dense_layers = self.num_layers - self.num_moe_layers
        return (
            num_dense_layers * self.matmul_parameters_per_layer
            + self.num_moe_layers * self.matmul_parameters_per_moe_layer
            + self.hidden_size * self.vocab_size
        )

    @property
    def _attention_parameters(self) -> int:
        query_size = self.num_attention_heads * self.kv_channels
        key_value_size = 2 * self.num_query_groups * self.kv_channels
        return self.hidden_size * (2 * query_size + key_value_size)

    def _ffn_parameters(self, ffn_size: int) -> int:
        num_matrices = 3 if self.gated_linear_unit else 2
        return num_matrices * self.hidden_size * ffn_size

    @property
    def forward_flops_per_token(self) -> int:
        """Of all linear layers."""
        return 2 * self.matmul_parameters

    @property
    def forward_flops_per_pair(self) -> int:
        """Of attention in all layers, for one query and one key it sees."""
        return 4 * self.num_attention_heads * self.kv_channels * self.num_layers


def model_flops(shape: ModelShape, *, lengths: Sequence[int]) -> float:
    """Forward and backward FLOPs of documents of these lengths (tokens), however packed."""
    length = np.asarray(lengths, dtype=np.float64)
    num_tokens = float(length.sum())
    num_pairs = float((length * (length + 1) / 2).sum())
    forward = shape.forward_flops_per_token * num_tokens + shape.forward_flops_per_pair * num_pairs
    return 3 * forward
