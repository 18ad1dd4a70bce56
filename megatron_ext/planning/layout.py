"""What a prediction is made of: sizes of the model, and how they are spread over ranks.

Pure data that follows from a configuration, so that a search can vary it by the thousand without
reading YAML again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config import Config
from megatron_ext.planning.device_profile import NumberFormat

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Sizes that decide memory and time; names as in the configuration."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    sequence_length: int
    """Tokens of a document, for attention: as many pairs as documents of this length have."""
    is_tied: bool = False
    has_qk_layernorm: bool = False
    moe_layers: tuple[bool, ...] = ()
    """For each layer whether it has experts; empty: none has."""
    num_experts: int = 0
    expert_ffn_size: int = 0
    shared_ffn_size: int = 0
    topk: int = 0
    router_parameters: int = 0
    """Of one layer with experts."""
    gated: bool = True
    """SwiGLU's three matrices; two without (published GPT models)."""

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        """Keys and values together."""
        return 2 * self.num_query_groups * self.kv_channels

    @property
    def num_ffn_matrices(self) -> int:
        return 3 if self.gated else 2

    def has_experts(self, layer: int) -> bool:
        return bool(self.moe_layers) and self.moe_layers[layer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the work is spread; names as in the configuration where it has them.

    Attributes:
        tokens_per_rank: of a micro-batch, on each data-parallel rank.
        num_micro_batches: of a step, on each data-parallel rank.
        zero_stage: 1: optimizer state is spread over data-parallel ranks; 0: it is not.
        weight_bytes, grad_bytes: of one element.
        state_bytes: of the optimizer for one parameter, float32 copy included.
    """

    num_ranks: int
    tensor_size: int
    pipeline_size: int
    virtual_size: int
    expert_size: int
    sequence_parallel: bool
    tokens_per_rank: int
    num_micro_batches: int
    recompute: Recompute
    recompute_modules: tuple[str, ...]
    recompute_num_layers: int
    zero_stage: int
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    weight_bytes: int
    grad_bytes: int
    state_bytes: int
    number_format: NumberFormat = "bf16"
    """Of the products of the layers' linear maps."""
    context_size: int = 1
    """Data-parallel ranks that share the longest sequence."""
    emulation_bytes: int = 0
    """Of one element of an operand while plain torch quantises it; 0 where kernels do."""
    expert_overlap: float = 0.0
    """Share of the experts' all-to-alls that hides behind products."""
    max_logit_bytes: int | None = None
    """Of logits that exist at once; None: all do (published frameworks)."""
    max_logit_tokens: int = 1 << 20
    """Whose logits exist at once, where there is a limit."""
    max_softmax_bytes: int = 1 << 62
    """Of logits that exist in float32 besides."""

    @property
    def base_format(self) -> NumberFormat:
        """Of all other products."""
        return "fp32" if self.weight_bytes == 4 else "bf16"

    @property
    def data_size(self) -> int:
        return self.num_ranks // (self.tensor_size * self.pipeline_size)

    @property
    def tokens_per_step(self) -> int:
        return self.tokens_per_rank * self.num_micro_batches * self.data_size

    @property
    def expert_data_size(self) -> int:
        """Ranks that hold the same experts."""
        return max(1, self.data_size * self.tensor_size // self.expert_size)


def model_size(config: Config, *, vocab_size: int, router_parameters: int = 0) -> ModelSize:
    """Sizes of a configuration's model; vocab_size padded."""
    model, moe = config.model, config.moe
    return ModelSize(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        vocab_size=vocab_size,
        sequence_length=config.data.max_sequence_length,
        is_tied=not model.untie_embeddings_and_output_weights,
        has_qk_layernorm=model.qk_layernorm,
        moe_layers=tuple(bool(has_experts) for has_experts in config.moe_layers),
        num_experts=moe.num_moe_experts or 0,
        expert_ffn_size=config.expert_ffn_size if moe.num_moe_experts else 0,
        shared_ffn_size=moe.moe_shared_expert_intermediate_size or 0,
        topk=moe.moe_router_topk if moe.num_moe_experts else 0,
        router_parameters=router_parameters,
    )


# Logits of the chunked loss exist for this many bytes at once (`linear_cross_entropy`).
_LOGIT_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
_MAX_LOGIT_TOKENS = {"cpu": 1024, "cuda": 1 << 20}
_SOFTMAX_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}


# Recipes of precision that are not here are of 4 bits.
# Random bits, float32 copies and codes side by side (measured).
_EMULATION_BYTES = 20
_RECIPE_FORMATS: dict[str, NumberFormat] = {
    "bf16": "bf16",
    "fp8_tensorwise": "fp8",
    "fp8_blockwise": "fp8",
    "mxfp8": "fp8",
}


def _num_chunks(config: Config) -> int:
    """In which the experts' messages travel; measured at the start of a run where it says auto."""
    chunks = config.moe.moe_num_chunks
    return chunks if isinstance(chunks, int) else 2


def layout_of(
    config: Config, *, num_ranks: int, vocab_size: int, is_bf16: bool, is_cpu: bool = True
) -> Layout:
    """How a checked configuration spreads over ranks; is_cpu: what they compute on."""
    parallel, train = config.parallel, config.train
    tokens = config.data.micro_batch_tokens
    model_ranks = parallel.model_parallel_size
    per_round = tokens * (num_ranks // model_ranks)
    device = "cpu" if is_cpu else "cuda"
    weight_bytes = 2 if is_bf16 else 4
    number_format = _RECIPE_FORMATS.get(config.precision.recipe, "fp4") if is_bf16 else "fp32"
    states = {"adam": 2, "lion": 1}[config.optim.optimizer]
    return Layout(
        num_ranks=num_ranks,
        tensor_size=parallel.tensor_model_parallel_size,
        pipeline_size=parallel.pipeline_model_parallel_size,
        virtual_size=parallel.virtual_pipeline_model_parallel_size or 1,
        expert_size=parallel.expert_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        tokens_per_rank=tokens,
        num_micro_batches=-(-(train.global_batch_tokens or per_round) // per_round),
        recompute=parallel.recompute_granularity,
        recompute_modules=tuple(parallel.recompute_modules),
        recompute_num_layers=parallel.recompute_num_layers,
        zero_stage=1 if parallel.use_distributed_optimizer else 0,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        weight_bytes=weight_bytes,
        number_format=number_format,
        context_size=min(num_ranks // model_ranks, -(-config.data.max_sequence_length // tokens)),
        emulation_bytes=_EMULATION_BYTES if device == "cpu" and number_format == "fp4" else 0,
        expert_overlap=1 - 1 / _num_chunks(config),
        grad_bytes=4 if config.precision.grad_reduce_in_fp32 or not is_bf16 else 2,
        state_bytes=4 * states + (4 if is_bf16 else 0),
        max_logit_bytes=_LOGIT_BYTES[device],
        max_logit_tokens=_MAX_LOGIT_TOKENS[device],
        max_softmax_bytes=_SOFTMAX_BYTES[device],
    )
