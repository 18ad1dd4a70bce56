"""`megatron-ext plan`: check a configuration and show what it amounts to, with no rank started."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatron_ext.config import Config
from megatron_ext.config_check import check_config, data_parallel_size
from megatron_ext.config_file import dump_config, load_config


def plan(source: str, overrides: Sequence[str], *, num_ranks: int | None, as_json: bool) -> int:
    """Print the resolved tree and what follows from it; returns the exit code."""
    config = load_config(source, overrides)
    world_size = num_ranks if num_ranks is not None else config.launch.num_ranks
    config = check_config(config, world_size=world_size)
    figures = _figures(config, world_size)
    if as_json:
        print(json.dumps(figures | {"megatron_flags": megatron_flags(config)}))
        return 0
    print(dump_config(config))
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):24} {value:,}")
    print("\nthe same in megatron's words:\n  " + " ".join(megatron_flags(config)))
    return 0


def num_parameters(config: Config, *, vocab_size: int) -> int:
    """Weights of the whole model, norms, embeddings and all experts included."""
    model = config.model
    h, d = model.hidden_size, model.head_dim
    attention = h * d * (2 * model.num_attention_heads + 2 * model.query_groups)
    norms = 2 * h + (2 * d if model.qk_layernorm else 0)
    dense = 3 * h * model.ffn_size
    num_moe_layers = sum(config.moe_layers)
    layers = model.num_layers * (attention + norms)
    layers += (model.num_layers - num_moe_layers) * dense + num_moe_layers * _expert_weights(config)
    embeddings = vocab_size * h * (2 if model.untie_embeddings_and_output_weights else 1)
    return layers + embeddings + h


def _expert_weights(config: Config) -> int:
    """Weights of one layer's experts, shared ones and router."""
    h, num_experts = config.model.hidden_size, config.moe.num_moe_experts or 0
    inner = num_experts * config.expert_ffn_size
    inner += config.moe.moe_shared_expert_intermediate_size or 0
    return 3 * h * inner + _router_weights(config)


def _router_weights(config: Config) -> int:
    h, moe = config.model.hidden_size, config.moe
    num_experts = moe.num_moe_experts or 0
    if moe.moe_router_type == "x_moe":
        size = moe.projected_size
        return size * (num_experts + h) + 1
    return num_experts * h * (2 if moe.moe_router_type == "noisy_topk" else 1)


def _figures(config: Config, world_size: int) -> dict[str, int]:
    dp = data_parallel_size(config, world_size)
    tokens = config.train.global_batch_tokens or 0
    figures = {
        "ranks": world_size,
        "data_parallel_size": dp,
        "tokens_per_step": tokens,
        "micro_batches_per_rank": -(-tokens // (config.data.micro_batch_tokens * dp)),
        "tokens_in_all_steps": tokens * config.train.train_iters,
    }
    if config.model.vocab_size is not None:
        figures["parameters"] = num_parameters(config, vocab_size=config.model.vocab_size)
    return figures


def megatron_flags(config: Config) -> list[str]:
    """The options of Megatron-LM that mean the same, as far as it has them."""
    model, parallel, optim = config.model, config.parallel, config.optim
    flags = {
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
    words += _moe_flags(config)
    words += ["--normalization RMSNorm", "--swiglu", "--disable-bias-linear"]
    words += ["--position-embedding-type rope", "--calculate-per-token-loss"]
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
