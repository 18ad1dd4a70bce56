"""A configuration as the sizes that decide FLOPs, balance and messages; without torch."""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.config import Config
from parallel.plan.flops import ModelShape


def model_shape(config: Config, vocab_size: int) -> ModelShape:
    """The sizes that decide FLOPs and balance; of experts those that one token meets."""
    model, moe = config.model, config.moe
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        vocab_size=vocab_size,
        num_moe_layers=sum(config.moe_layers),
        moe_active_ffn_size=(
            moe.moe_router_topk * config.expert_ffn_size
            + (moe.moe_shared_expert_intermediate_size or 0)
        ),
        num_moe_experts=moe.num_moe_experts or 0,
    )


def stage_shape(config: Config, shape: ModelShape) -> ModelShape:
    """What one rank of one pipeline stage holds, the output layer spread evenly over stages."""
    parallel = config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return replace(
        shape,
        num_layers=max(1, shape.num_layers // stages),
        ffn_hidden_size=shape.ffn_hidden_size // tensor,
        # With experts tensor-parallel ranks share the tokens instead; the work is the same.
        num_moe_layers=shape.num_moe_layers // stages,
        moe_active_ffn_size=shape.moe_active_ffn_size // tensor,
        num_moe_experts=shape.num_moe_experts // tensor,
        num_attention_heads=shape.num_attention_heads // tensor,
        num_query_groups=shape.num_query_groups // tensor,
        vocab_size=shape.vocab_size // (tensor * stages),
    )
