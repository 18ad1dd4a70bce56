"""The network: megatron's `GPTModel` with a Llama-style layer of our own modules.

x -> embedding -> num_layers x (norm, attention, +, norm, SwiGLU, +) -> norm. The product with the
output weight belongs to the loss (`linear_cross_entropy`). Rotary positions are applied inside
attention, because only the packed batch knows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import (
    is_pipeline_first_stage,
    is_pipeline_last_stage,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn

from megatron_ext.attention import PackedCoreAttention, ReorderedNormSelfAttention
from megatron_ext.batch import round_up
from megatron_ext.config import Config, ModelConfig
from megatron_ext.errors import UserError
from megatron_ext.gradient_gaps import HeldGradients, gradient_element_bytes
from megatron_ext.mesh import Mesh
from megatron_ext.mlp import ReorderedNormMLP, SwiGLUMLP
from megatron_ext.moe_layer import MoEMLP, PackedTransformerLayer, ReorderedNormMoEMLP
from megatron_ext.norm import RMSNorm
from megatron_ext.output_layer import OutputLayer
from megatron_ext.parameters import init_parameters
from megatron_ext.precision.parallel_linear import (
    PrecisionColumnParallelLinear,
    PrecisionRowParallelLinear,
)
from moe.dispatch.hierarchical import NodeGroups


def padded_vocab_size(model: ModelConfig, tokenizer_vocab_size: int) -> int:
    """Rows of the embedding, the same for every tensor-parallel size.

    Raises:
        UserError: the tokenizer has ids beyond `model.vocab_size`.
    """
    if model.vocab_size is not None and model.vocab_size < tokenizer_vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's "
            f"{tokenizer_vocab_size}; leave it unset, or use at least that"
        )
    return round_up(model.vocab_size or tokenizer_vocab_size, model.make_vocab_size_divisible_by)


def transformer_config(config: Config, *, dtype: torch.dtype, is_cuda: bool) -> TransformerConfig:
    """Our tree as megatron's configuration object."""
    model, parallel = config.model, config.parallel
    recompute = parallel.recompute_granularity
    is_interleaved = (parallel.virtual_pipeline_model_parallel_size or 1) > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.layernorm_epsilon,
        qk_layernorm=model.qk_layernorm,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        # `init_parameters` fills the weights again, the same on every layout; but only where
        # megatron initialises does it mark which dim is spread over ranks.
        perform_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=parallel.recompute_num_layers if recompute == "full" else None,
        recompute_modules=list(parallel.recompute_modules) if recompute == "selective" else None,
        calculate_per_token_loss=True,
        bias_activation_fusion=is_cuda,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
        # Streams order a send before the release of its buffer on a GPU; gloo has no streams, and
        # a send in flight would read freed memory.
        overlap_p2p_comm=is_interleaved and is_cuda,
        # With two interleaved stages the next and the previous rank are one, and a batch of sends
        # and receives would mix activations with gradients.
        batch_p2p_comm=not is_interleaved,
        attention_softmax_in_fp32=False,
        **_moe_options(config),
    )


def _moe_options(config: Config) -> dict[str, Any]:
    """What megatron itself must know of experts; how they work is our layer's business."""
    if config.moe.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": config.moe.num_moe_experts,
        # Layers that differ are saved each under its own number.
        "moe_layer_freq": config.moe.moe_layer_freq,
        "moe_ffn_hidden_size": config.expert_ffn_size,
        "moe_router_topk": config.moe.moe_router_topk,
        "moe_router_pre_softmax": config.moe.moe_router_pre_softmax,
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": config.parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
    }


def residual_add(
    training: bool, fused: bool
) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """megatron's bias-dropout-add without bias and dropout, which pretraining does not use."""

    def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, _: float) -> Tensor:
        return output_with_bias[0] + residual

    return add


def layer_spec(
    config: Config, *, has_experts: bool, node_groups: NodeGroups | None = None
) -> ModuleSpec:
    """One transformer layer as megatron builds it; node_groups: see `Mesh`."""
    model = config.model
    reordered = model.norm_position == "reordered"
    head_norm = RMSNorm if model.qk_layernorm else None
    return ModuleSpec(
        module=PackedTransformerLayer if has_experts else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if reordered else RMSNorm,
            self_attention=ModuleSpec(
                module=ReorderedNormSelfAttention if reordered else SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=PrecisionColumnParallelLinear,
                    core_attention=PackedCoreAttention,
                    linear_proj=PrecisionRowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=residual_add,
            pre_mlp_layernorm=IdentityOp if reordered else RMSNorm,
            mlp=_feed_forward_spec(config, has_experts=has_experts, node_groups=node_groups),
            mlp_bda=residual_add,
        ),
    )


def _feed_forward_spec(
    config: Config, *, has_experts: bool, node_groups: NodeGroups | None
) -> ModuleSpec:
    reordered = config.model.norm_position == "reordered"
    submodules = MLPSubmodules(
        linear_fc1=PrecisionColumnParallelLinear, linear_fc2=PrecisionRowParallelLinear
    )
    if has_experts:
        return ModuleSpec(
            module=ReorderedNormMoEMLP if reordered else MoEMLP,
            submodules=submodules,
            params={"moe": config.moe, "node_groups": node_groups},
        )
    return ModuleSpec(module=ReorderedNormMLP if reordered else SwiGLUMLP, submodules=submodules)


def build_model(
    config: Config,
    *,
    mesh: Mesh,
    vocab_size: int,
    dtype: torch.dtype,
    is_cuda: bool,
) -> list[GPTModel]:
    """This rank's model chunks (more than one with interleaved pipelining), weights filled.

    Args:
        vocab_size: padded rows of the vocabulary.
    """
    megatron_config = transformer_config(config, dtype=dtype, is_cuda=is_cuda)
    num_chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    chunks = [
        _build_chunk(
            config,
            megatron_config,
            vocab_size,
            node_groups=mesh.expert_node_groups,
            vp_stage=stage if num_chunks > 1 else None,
        )
        for stage in range(num_chunks)
    ]
    init_parameters(
        chunks,
        mesh=mesh,
        seed=config.train.seed,
        std=config.model.init_method_std,
        num_layers=config.model.num_layers,
    )
    return chunks


def _build_chunk(
    config: Config,
    megatron_config: TransformerConfig,
    vocab_size: int,
    *,
    node_groups: NodeGroups | None,
    vp_stage: int | None,
) -> GPTModel:
    first = get_transformer_layer_offset(megatron_config, vp_stage=vp_stage)
    num_layers = get_num_layers_to_build(megatron_config, vp_stage=vp_stage)
    block = TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(config, has_experts=has_experts, node_groups=node_groups)
            for has_experts in config.moe_layers[first : first + num_layers]
        ],
        layer_norm=RMSNorm,
    )
    chunk = GPTModel(
        config=megatron_config,
        transformer_layer_spec=block,
        vocab_size=vocab_size,
        max_sequence_length=config.data.max_sequence_length,
        pre_process=is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        position_embedding_type="none",
        vp_stage=vp_stage,
    )
    if chunk.post_process:
        # GPTModel takes no spec for this layer. Only `forward` differs.
        chunk.output_layer.__class__ = OutputLayer
    return chunk.to(torch.cuda.current_device())


def wrap_data_parallel(
    chunks: list[GPTModel], config: Config, *, gaps: HeldGradients | None = None
) -> list[DistributedDataParallel]:
    """Gradient buffers and their reduction over the data-parallel ranks.

    Args:
        gaps: what is to hold reductions back; buckets are as large as it has room for, where the
            configuration does not say.
    """
    parallel = config.parallel
    bucket_size = parallel.ddp_bucket_size
    if gaps is not None and bucket_size is None:
        element_bytes = gradient_element_bytes(config, next(chunks[0].parameters()))
        bucket_size = gaps.room.bucket_size(element_bytes=element_bytes)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        bucket_size=bucket_size,
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=ddp_config,
            module=chunk,
            # Later chunks finish their backward first; their gradients go out in one piece.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    if gaps is not None:
        gaps.hold_back(wrapped)
    return wrapped


def unwrap(chunk: nn.Module) -> Any:
    """The GPTModel inside the data-parallel wrapper."""
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def output_weight(chunk: nn.Module) -> Tensor:
    """Of the last chunk, for its hidden states: [vocab_size / tensor_size, hidden_size].

    Tied, it is the embedding.
    """
    model = unwrap(chunk)
    weight: Tensor = (
        model.shared_embedding_or_output_weight()
        if model.share_embeddings_and_output_weights
        else model.output_layer.weight
    )
    return weight
