"""Everything a run may set: one typed tree, one YAML section per class.

The section `moe` stands in `moe_config.py`. Field names are megatron's where megatron has the
idea. Types are checked here, field by field; what must hold between fields stands in
`config_check.py`; reading files and overrides in `config_file.py`. Lengths and batch sizes are in
tokens, because tokens are the unit.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field

from megatron_ext.config_section import Section
from megatron_ext.moe_config import MoEConfig

Planner = Literal["packing", "hdp", "static_cp", "megatron"]
RecomputeModule = Literal["core_attn", "mlp"]


class ModelConfig(Section):
    """The shape of the network (Llama-style decoder)."""

    num_layers: int = Field(12, ge=1)
    hidden_size: int = Field(768, ge=1)
    ffn_hidden_size: int | None = Field(None, ge=1)
    """Width of SwiGLU's inner layer; by default 8/3 of hidden_size, rounded up to 64."""
    num_attention_heads: int = Field(12, ge=1)
    num_query_groups: int | None = Field(None, ge=1)
    """Key/value heads of grouped-query attention; by default num_attention_heads."""
    kv_channels: int | None = Field(None, ge=1)
    """Width of one head; by default hidden_size / num_attention_heads."""
    rotary_base: float = Field(10000.0, gt=0)
    layernorm_epsilon: float = Field(1e-5, gt=0)
    qk_layernorm: bool = False
    """RMSNorm on queries and keys of each head."""
    norm_position: Literal["pre", "reordered"] = "pre"
    """pre: x + f(norm(x)). reordered: x + norm(f(x)) (OLMo 2)."""
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = Field(0.02, gt=0)
    make_vocab_size_divisible_by: int = Field(128, ge=1)
    vocab_size: int | None = Field(None, ge=1)
    """Rows of the vocabulary; by default the tokenizer's."""
    z_loss_coeff: float = Field(0.0, ge=0)
    """Weight of mean squared log-sum-exp of the logits."""

    @property
    def ffn_size(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


class PrepareConfig(Section):
    """How to make a corpus that is not there yet (the options of `data prepare`)."""

    input: list[str] = Field(min_length=1)
    tokenizer: str = "train:8192"
    include: list[str] = Field(default_factory=list)
    text_key: str = "text"
    validation_fraction: float = Field(0.01, gt=0, lt=1)
    bad_records: Literal["stop", "skip"] = "stop"


class CorpusConfig(Section):
    """One prepared corpus and its share of the training tokens."""

    path: str
    weight: float = Field(1.0, gt=0)
    label: str | None = Field(None, min_length=1)
    """Domain of its text, for figures that tell domains apart; by default the folder's name."""
    prepare: PrepareConfig | None = None

    @property
    def domain(self) -> str:
        return self.label or os.path.basename(os.path.normpath(self.path))


class DataConfig(Section):
    """What is read, and how it is cut and packed."""

    corpora: list[CorpusConfig] = Field(min_length=1)
    max_sequence_length: int = Field(4096, ge=1)
    """Documents keep their length up to here; longer ones are cut into pieces of it."""
    tokens_per_rank: int | None = Field(None, ge=1)
    """Capacity of one micro-batch on one rank; by default max_sequence_length."""
    prefetch: bool = True
    """Plan and read the next step in the background."""

    @property
    def domains(self) -> tuple[str, ...]:
        """The labels of the corpora, each once, in the order of the corpora."""
        return tuple(dict.fromkeys(corpus.domain for corpus in self.corpora))

    @property
    def micro_batch_tokens(self) -> int:
        return self.tokens_per_rank or self.max_sequence_length


class TrainConfig(Section):
    """How long, how much at a time, and how often it is looked at."""

    train_iters: int = Field(1000, ge=1)
    global_batch_tokens: int | None = Field(None, ge=1)
    """Tokens of one optimizer step over all ranks; at most, for sequences are whole."""
    num_micro_batches: int | None = Field(None, ge=1)
    """Micro-batches of tokens_per_rank per rank and step; gives global_batch_tokens if unset."""
    seed: int = Field(1234, ge=0)
    eval_interval: int = Field(500, ge=0)
    """Steps between validations; 0 validates only at the end."""
    eval_tokens: int | None = Field(None, ge=1)
    """Held-out tokens of one validation, in whole documents; by default all."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a step with a loss or gradient that is not finite does; such a step is never applied."""
    max_skipped_steps: int = Field(10, ge=0)
    """With nonfinite: skip, how many skipped steps in a row end the run."""


class OptimConfig(Section):
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adam", "lion"] = "adam"
    lr: float = Field(3e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_decay_style: Literal["constant", "cosine", "linear", "wsd", "infinite"] = "cosine"
    lr_warmup_iters: int = Field(0, ge=0)
    lr_decay_iters: int | None = Field(None, ge=1)
    """Step at which the decay has ended; by default train_iters."""
    lr_wsd_decay_iters: int | None = Field(None, ge=0)
    """Steps of the last decay of `wsd` and `infinite`; by default a tenth of lr_decay_iters."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"
    lr_cooldown_iters: int | None = Field(None, ge=0)
    """`infinite`: steps from lr down to constant_lr; by default a tenth of lr_decay_iters."""
    constant_lr: float | None = Field(None, ge=0)
    """`infinite`: learning rate of the constant part; by default half of lr."""
    weight_decay: float = Field(0.1, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    lion_beta1: float = Field(0.9, ge=0, lt=1)
    lion_beta2: float = Field(0.99, ge=0, lt=1)
    clip_grad: float = Field(1.0, ge=0)
    """Largest global L2 norm of the gradient; 0 does not clip."""

    def decay_end(self, train_iters: int) -> int:
        """Step at which the decay has ended."""
        return self.lr_decay_iters or train_iters

    def last_decay_iters(self, train_iters: int) -> int:
        """Steps of the last decay of `wsd` and `infinite`."""
        if self.lr_wsd_decay_iters is not None:
            return self.lr_wsd_decay_iters
        return self.decay_end(train_iters) // 10

    def cooldown_iters(self, train_iters: int) -> int:
        """Steps of `infinite` from lr down to its constant part."""
        if self.lr_cooldown_iters is not None:
            return self.lr_cooldown_iters
        return self.decay_end(train_iters) // 10

    @property
    def constant_rate(self) -> float:
        """Learning rate of the constant part of `infinite`."""
        return self.constant_lr if self.constant_lr is not None else self.lr / 2


def _core_attention() -> list[RecomputeModule]:
    return ["core_attn"]


class ParallelConfig(Section):
    """How ranks share the work; data parallelism is what is left of the world."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = Field(1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=1)
    """Model chunks per pipeline stage; more than one interleaves (1F1B otherwise)."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share the experts of each layer, consecutive among tensor x data parallel ones."""
    ranks_per_node: int | None = Field(None, ge=1)
    """Consecutive ranks with fast links among them, for moe_token_dispatcher_type; by default those
    that the launcher started on one machine."""
    use_distributed_optimizer: bool = True
    """ZeRO-1: optimizer state spread over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    ddp_bucket_size: int | None = Field(None, ge=1)
    """Elements of a gradient bucket with overlap_grad_reduce; by default megatron's choice."""
    grad_reduce_in_gaps: bool = False
    """Buckets that are ready wait until the exchanges of an expert layer leave the links free, and
    are as large as fits, if ddp_bucket_size does not say; with overlap_grad_reduce and
    moe_num_chunks."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """selective recomputes the modules named below; full recomputes whole layers."""
    recompute_modules: list[RecomputeModule] = Field(default_factory=_core_attention)
    recompute_num_layers: int = Field(1, ge=1)
    """full: layers recomputed together."""

    planner: Planner = "packing"
    """Who decides which rank computes what: packing keeps sequences whole; hdp gives each the ranks
    it needs; static_cp spreads all over one number of ranks; megatron is megatron-core's own."""
    offload_activations: bool = False
    """hdp: part of a long sequence's activations waits in host memory, so fewer ranks hold it."""
    cost_profile: str | None = None
    """File written by `megatron-ext profile`; without it costs are estimated from the shape."""

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def num_expert_data_ranks(self) -> int:
        """Consecutive data-parallel ranks that exchange tokens in each layer with experts."""
        return max(1, self.expert_model_parallel_size // self.tensor_model_parallel_size)


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device has it in hardware, else fp32."""
    grad_reduce_in_fp32: bool = True
    recipe: Literal[
        "bf16",
        "fp8_tensorwise",
        "fp8_blockwise",
        "mxfp8",
        "mxfp4",
        "mxfp4_stochastic",
        "nvfp4",
        "quartet",
        "quartet2",
        "luq",
    ] = "bf16"
    """Formats of the three matrix products of the linear layers in transformer layers; the rest,
    weights, optimizer, embedding and output layer keep `dtype`. bf16: products of `dtype` too."""
    operands: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Single fields of single operands that differ from the recipe's, e.g.
    {dgrad_grad: {rounding: nearest}}; block_format null leaves an operand in `dtype`."""
    backward_reads: Literal["original", "stored"] | None = None
    """What backward stores copies of: the layer's input and weight, or what forward multiplied, in
    its basis and with its mask (Quartet); null: the recipe's own."""
    keep_layers: list[int] | None = None
    """Transformer layers, from 0, whose products keep `dtype`; null: what keep_last_share says."""
    keep_last_share: float | None = Field(default=None, ge=0, le=1)
    """Share of the layers, the last ones, rounded up; null: the recipe's own."""
    backend: Literal[
        "auto", "reference", "cpu", "triton", "cuda", "scaled_mm", "transformer_engine"
    ] = "auto"
    """Who stores and multiplies in few bits; auto: the fastest of the project's own that this
    device has. What is named here runs, or the run does not start. transformer_engine: NVIDIA's
    library, with its recipe of the same name."""


class CheckpointConfig(Section):
    """What is saved, how often, and what a run starts from."""

    save_interval: int = Field(500, ge=0)
    """Steps between checkpoints; 0 saves only at the end and on request."""
    keep: int = Field(3, ge=1)
    """Checkpoints that stay; older ones are removed after a newer one is complete."""
    load: str | None = None
    """Run folder whose newest weights and optimizer state a new run starts from; steps, schedule
    and data begin anew."""
    allow_precision_change: bool = False
    """Go on with a run although the formats of its linear layers were others when it was saved."""


class LogConfig(Section):
    """Where a run writes and what it shows."""

    run_dir: str | None = None
    """Folder of the run; by default runs/RECIPE."""
    log_interval: int = Field(10, ge=1)
    """Steps between console lines; metrics.jsonl has a line for every step."""
    tensorboard: bool = False
    wandb_project: str | None = None
    sample_prompt: str | None = None
    """When set, a sample of this prompt is printed at the end."""
    sample_tokens: int = Field(160, ge=1)


class LaunchConfig(Section):
    """Ranks and devices."""

    num_ranks: int = Field(1, ge=1)
    """Local ranks when neither torchrun nor srun started us (same as --ranks)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_profile: str | None = None
    """Device that `plan` predicts for: a name such as h100 or mi250x, or a YAML file; by default
    the machine's own accelerator where it has one, h100 for device cuda, else cpu."""
    preflight: Literal["auto", "always", "never"] = "auto"
    """Compare all ranks and try their links before the first step; auto: on several machines."""
    timeout_seconds: float = Field(600.0, gt=0)
    """How long a rank waits for the others in a collective."""


class Config(Section):
    """The whole tree."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    moe: MoEConfig = MoEConfig()
    precision: PrecisionConfig = PrecisionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    launch: LaunchConfig = LaunchConfig()

    @property
    def moe_layers(self) -> list[bool]:
        """For each layer of the model whether it has experts."""
        num_layers, freq = self.model.num_layers, self.moe.moe_layer_freq
        if self.moe.num_moe_experts is None:
            return [False] * num_layers
        if isinstance(freq, int):
            return [layer % freq == 0 for layer in range(num_layers)]
        return [bool(entry) for entry in freq]

    @property
    def balance_coefficients(self) -> dict[str, float]:
        """The losses that keep the load of the experts even, those of weight 0 left out."""
        types, weights = self.moe.moe_router_load_balancing_type, self.moe.moe_aux_loss_coeff
        found: dict[str, float] = dict(
            zip(
                types if isinstance(types, list) else [types],
                weights if isinstance(weights, list) else [weights],
                strict=True,
            )
        )
        found["device_aux_loss"] = self.moe.moe_device_aux_loss_coeff
        return {name: weight for name, weight in found.items() if weight}

    @property
    def num_balance_groups(self) -> int:
        """Groups of experts between which `moe_device_aux_loss_coeff` wants an even load."""
        groups = self.moe.moe_device_aux_loss_num_groups
        return groups or self.parallel.expert_model_parallel_size

    @property
    def lsh_layers(self) -> list[int]:
        """Layers whose tokens travel compressed, ascending."""
        if self.moe.moe_lsh_num_hashes is None:
            return []
        named = self.moe.moe_lsh_layers
        return [
            layer
            for layer, has_experts in enumerate(self.moe_layers)
            if has_experts and (named is None or layer in named)
        ]

    @property
    def expert_ffn_size(self) -> int:
        """Inner width of one expert."""
        return self.moe.moe_ffn_hidden_size or self.model.ffn_size
