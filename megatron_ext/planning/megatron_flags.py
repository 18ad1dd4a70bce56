"""A configuration in Megatron-LM's own options, as far as it has them."""

from __future__ import annotations

from megatron_ext.config import Config


def megatron_flags(config: Config) -> list[str]:
    """The options of Megatron-LM that mean the same, as far as it has them."""
    model, parallel, optim = config.model, config.parallel, config.optim
    chunks = parallel.virtual_pipeline_model_parallel_size
    flags: dict[str, float | str] = {
        "num-layers": model.num_layers,
        "hidden-size": model.hidden_size,
        "ffn-hidden-size": model.ffn_size,
        "num-attention-heads": model.num_attention_heads,
        "kv-channels": model.head_dim,
        "rotary-base": int(model.rotary_base),
        "norm-epsilon": model.layernorm_epsilon,
        "tensor-model-parallel-size": parallel.tensor_model_parallel_size,
        "pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
        "lr": optim.lr,
        "min-lr": optim.min_lr,
        "lr-warmup-iters": optim.lr_warmup_iters,
        "weight-decay": optim.weight_decay,
        "adam-beta1": optim.adam_beta1,
        "adam-beta2": optim.adam_beta2,
        "clip-grad": optim.clip_grad,
        "train-iters": config.train.train_iters,
        "seq-length": config.data.max_sequence_length,
    }
    words = [f"--{name} {value}" for name, value in flags.items()]
    words += [*_batch_flags(config), *_recompute_flags(config), *_precision_flags(config)]
    words += _moe_flags(config)
    words += ["--normalization RMSNorm", "--swiglu", "--disable-bias-linear"]
    words += ["--position-embedding-type rope", "--calculate-per-token-loss"]
    if chunks:
        stages = parallel.pipeline_model_parallel_size
        per_chunk = model.num_layers // (stages * chunks)
        words.append(f"--num-layers-per-virtual-pipeline-stage {per_chunk}")
    if model.query_groups != model.num_attention_heads:
        words.append(f"--group-query-attention --num-query-groups {model.query_groups}")
    switches = {
        "qk-layernorm": model.qk_layernorm,
        "untie-embeddings-and-output-weights": model.untie_embeddings_and_output_weights,
        "sequence-parallel": parallel.sequence_parallel,
        "use-distributed-optimizer": parallel.use_distributed_optimizer,
        "overlap-grad-reduce": parallel.overlap_grad_reduce,
        "overlap-param-gather": parallel.overlap_param_gather,
        "bf16": config.precision.dtype != "fp32",
    }
    return words + [f"--{name}" for name, is_on in switches.items() if is_on]


def _batch_flags(config: Config) -> list[str]:
    """Megatron counts sequences, all of one length."""
    length, tokens = config.data.max_sequence_length, config.train.global_batch_tokens or 0
    words = []
    if config.data.micro_batch_tokens % length == 0:
        words.append(f"--micro-batch-size {config.data.micro_batch_tokens // length}")
    if tokens and tokens % length == 0:
        words.append(f"--global-batch-size {tokens // length}")
    return words


def _recompute_flags(config: Config) -> list[str]:
    parallel = config.parallel
    if parallel.recompute_granularity == "selective":
        modules = " ".join(parallel.recompute_modules)
        return [f"--recompute-granularity selective --recompute-modules {modules}"]
    if parallel.recompute_granularity == "full":
        return [
            "--recompute-granularity full --recompute-method uniform "
            f"--recompute-num-layers {parallel.recompute_num_layers}"
        ]
    return []


def _precision_flags(config: Config) -> list[str]:
    """Recipes that Transformer Engine has too."""
    match config.precision.recipe:
        case "fp8_tensorwise":
            return ["--fp8-format hybrid --fp8-recipe tensorwise"]
        case "fp8_blockwise":
            return ["--fp8-format e4m3 --fp8-recipe blockwise"]
        case "mxfp8":
            return ["--fp8-format e4m3 --fp8-recipe mxfp8"]
        case "nvfp4":
            return ["--fp4-format e2m1 --fp4-recipe nvfp4"]
    return []


def _moe_flags(config: Config) -> list[str]:
    moe = config.moe
    if moe.num_moe_experts is None:
        return []
    pattern = str([int(has_experts) for has_experts in config.moe_layers]).replace(" ", "")
    balance = {
        name: weight
        for name, weight in config.balance_coefficients.items()
        if name != "device_aux_loss"
    }
    flags = {
        "num-experts": moe.num_moe_experts,
        "moe-layer-freq": pattern,
        "moe-ffn-hidden-size": config.expert_ffn_size,
        "moe-shared-expert-intermediate-size": moe.moe_shared_expert_intermediate_size,
        "moe-router-topk": moe.moe_router_topk,
        "moe-router-topk-scaling-factor": moe.moe_router_topk_scaling_factor,
        "moe-z-loss-coeff": moe.moe_z_loss_coeff or None,
        "moe-router-score-function": moe.moe_router_score_function,
        "moe-router-num-groups": moe.moe_router_num_groups,
        "moe-router-group-topk": moe.moe_router_group_topk,
        "moe-expert-capacity-factor": moe.moe_expert_capacity_factor,
        "moe-router-load-balancing-type": " ".join(balance) or "none",
        "moe-aux-loss-coeff": " ".join(map(str, balance.values())) or None,
        "moe-router-dtype": "fp32",
        "moe-token-dispatcher-type": "alltoall",
        "expert-model-parallel-size": config.parallel.expert_model_parallel_size,
        "expert-tensor-parallel-size": 1,
    }
    if moe.moe_router_enable_expert_bias:
        flags["moe-router-bias-update-rate"] = moe.moe_router_bias_update_rate
    if moe.moe_expert_capacity_factor is not None and moe.moe_token_drop_policy != "random":
        flags["moe-token-drop-policy"] = moe.moe_token_drop_policy
    words = [f"--{name} {value}" for name, value in flags.items() if value is not None]
    switches = {
        "moe-router-pre-softmax": moe.moe_router_pre_softmax,
        "moe-router-enable-expert-bias": moe.moe_router_enable_expert_bias,
    }
    return words + [f"--{name}" for name, is_on in switches.items() if is_on]
