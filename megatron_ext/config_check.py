"""What must hold between fields, checked before any rank starts.

Each rule names the fields, their values and a value that would work. All broken rules are reported
together.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.compression_rules import compression_rules
from megatron_ext.config import Config
from megatron_ext.dispatcher_rules import dispatcher_rules
from megatron_ext.errors import UserError
from megatron_ext.moe_config import MoEConfig
from megatron_ext.precision.chosen_recipe import recipe_rules
from megatron_ext.router_rules import router_rules


def check_config(config: Config, *, world_size: int) -> Config:
    """Check the rules between fields and fill in what follows from others.

    Returns:
        The configuration with `train.global_batch_tokens` and `data.tokens_per_rank` set.

    Raises:
        UserError: naming every broken rule with its cure.
    """
    if world_size < 1:
        raise UserError(f"--ranks {world_size}: at least 1")
    problems = [
        *_model_rules(config),
        *_parallel_rules(config, world_size),
        *_moe_rules(config, world_size),
        *_schedule_rules(config),
        *recipe_rules(config),
    ]
    if not problems:
        problems = list(_batch_rules(config, world_size))
    if problems:
        raise UserError(
            "this configuration cannot run:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    return _filled_in(config, world_size)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks that hold the same part of the model."""
    return world_size // config.parallel.model_parallel_size


def _filled_in(config: Config, world_size: int) -> Config:
    tokens = config.train.global_batch_tokens or (
        (config.train.num_micro_batches or 1)
        * config.data.micro_batch_tokens
        * data_parallel_size(config, world_size)
    )
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"global_batch_tokens": tokens}),
            "data": config.data.model_copy(
                update={"tokens_per_rank": config.data.micro_batch_tokens}
            ),
        }
    )


def _divisors(number: int, *, at_most: int = 64) -> str:
    return ", ".join(str(d) for d in range(1, min(number, at_most) + 1) if number % d == 0)


def _model_rules(config: Config) -> Iterator[str]:
    model = config.model
    heads, groups = model.num_attention_heads, model.query_groups
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads={heads} does not divide model.hidden_size="
            f"{model.hidden_size}; use one of {_divisors(model.hidden_size)}, or set kv_channels"
        )
    elif model.head_dim % 2:
        yield (
            f"the width of a head is {model.head_dim}, but rotary positions turn pairs: "
            f"set model.kv_channels to an even number such as {model.head_dim + 1}"
        )
    if heads % groups:
        yield (
            f"model.num_query_groups={groups} does not divide model.num_attention_heads={heads}; "
            f"use one of {_divisors(heads)}"
        )


def _parallel_rules(config: Config, world_size: int) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    for name, number in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_query_groups", model.query_groups),
        ("model.ffn_hidden_size", model.ffn_size),
        ("model.make_vocab_size_divisible_by", model.make_vocab_size_divisible_by),
    ):
        # Query groups that were not set are the heads, and have been told.
        is_told = name == "model.num_query_groups" and model.num_query_groups is None
        if number % tp and not is_told:
            yield (
                f"parallel.tensor_model_parallel_size={tp} does not divide {name}={number}; "
                f"use one of {_divisors(number)}"
            )
    if world_size % parallel.model_parallel_size:
        yield (
            f"{world_size} ranks cannot be divided into tensor x pipeline parallel groups of "
            f"{tp} x {parallel.pipeline_model_parallel_size} = {parallel.model_parallel_size}; use "
            f"a multiple of {parallel.model_parallel_size} ranks (--ranks), or smaller parallel "
            "sizes"
        )
    if parallel.sequence_parallel and tp == 1:
        yield (
            "parallel.sequence_parallel needs parallel.tensor_model_parallel_size of 2 or more; "
            "set it to false"
        )
    if parallel.sequence_parallel and config.data.micro_batch_tokens % tp:
        yield (
            f"data.tokens_per_rank={config.data.micro_batch_tokens} is not a multiple of "
            f"parallel.tensor_model_parallel_size={tp}, which sequence_parallel divides it by"
        )
    if parallel.overlap_param_gather and not (
        parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    ):
        yield (
            "parallel.overlap_param_gather needs parallel.use_distributed_optimizer=true and "
            "parallel.overlap_grad_reduce=true"
        )
    yield from _pipeline_rules(config)


def _pipeline_rules(config: Config) -> Iterator[str]:
    parallel, num_layers = config.parallel, config.model.num_layers
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    if chunks > 1 and stages == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size={chunks} needs "
            "parallel.pipeline_model_parallel_size of 2 or more"
        )
    elif num_layers % (stages * chunks):
        yield (
            f"model.num_layers={num_layers} cannot be spread evenly over {stages} pipeline stages "
            f"x {chunks} chunks; use a multiple of {stages * chunks} layers, or one of "
            f"{_divisors(num_layers)} stages"
        )
    elif parallel.recompute_granularity == "full":
        # megatron asks for layers that do not exist when the last group is not whole.
        num_local = num_layers // (stages * chunks)
        if num_local % parallel.recompute_num_layers:
            yield (
                f"parallel.recompute_num_layers={parallel.recompute_num_layers} does not divide "
                f"the {num_local} layers that a rank runs at once; use one of "
                f"{_divisors(num_local)}"
            )


def _moe_rules(config: Config, world_size: int) -> Iterator[str]:
    moe, num_layers = config.moe, config.model.num_layers
    if moe.num_moe_experts is None:
        for name, default in MoEConfig():
            if getattr(moe, name) != default:
                yield f"moe.{name} is set, but there are no experts; set moe.num_moe_experts too"
        if config.parallel.expert_model_parallel_size > 1:
            yield (
                "parallel.expert_model_parallel_size="
                f"{config.parallel.expert_model_parallel_size} needs experts: set "
                "moe.num_moe_experts, or set it to 1"
            )
        return
    if moe.moe_router_topk > moe.num_moe_experts:
        yield (
            f"moe.moe_router_topk={moe.moe_router_topk} is more than moe.num_moe_experts="
            f"{moe.num_moe_experts}"
        )
    is_constant = moe.moe_router_topk == 1 and not moe.moe_router_pre_softmax
    if (
        is_constant
        and moe.moe_router_score_function == "softmax"
        and moe.moe_router_type != "expert_choice"
    ):
        yield (
            "with moe.moe_router_topk=1 a weight over the chosen experts alone is always 1 and the "
            "router would not learn; set moe.moe_router_pre_softmax=true"
        )
    if isinstance(moe.moe_layer_freq, int):
        if moe.moe_layer_freq < 1:
            yield f"moe.moe_layer_freq={moe.moe_layer_freq}: at least 1 (every layer)"
    elif len(moe.moe_layer_freq) != num_layers:
        yield (
            f"moe.moe_layer_freq has {len(moe.moe_layer_freq)} entries for model.num_layers="
            f"{num_layers} layers"
        )
    elif not any(moe.moe_layer_freq):
        yield "moe.moe_layer_freq gives experts to no layer; set a 1 somewhere"
    yield from router_rules(moe)
    yield from _balance_rules(config)
    yield from dispatcher_rules(config)
    yield from compression_rules(config)
    yield from _expert_parallel_rules(config, world_size)


def _balance_rules(config: Config) -> Iterator[str]:
    moe = config.moe
    names = ("moe.moe_router_load_balancing_type", "moe.moe_aux_loss_coeff")
    types, weights = moe.moe_router_load_balancing_type, moe.moe_aux_loss_coeff
    if isinstance(types, list) != isinstance(weights, list):
        yield f"{names[0]}={types} and {names[1]}={weights}: both must be lists, or neither"
    elif isinstance(types, list) and isinstance(weights, list):
        if len(types) != len(weights):
            yield f"{names[0]}={types} needs as many entries in {names[1]}, which is {weights}"
        if "none" in types or len(set(types)) < len(types) or not types:
            yield f"{names[0]}={types}: a list names one or more different losses; leave out 'none'"
    elif types == "none" and weights:
        yield f"{names[1]}={weights} does nothing without {names[0]}, e.g. global_aux_loss"
    elif types != "none" and not weights:
        yield f"{names[0]}={types} does nothing with {names[1]}=0; try 0.01"
    is_over_batch = "global_aux_loss" in (types if isinstance(types, list) else [types])
    if moe.moe_router_inputs_on_host and not (is_over_batch or moe.moe_device_aux_loss_coeff):
        yield (
            "moe.moe_router_inputs_on_host=true does nothing without a loss over the global batch; "
            f"leave it out, or set {names[0]}=global_aux_loss"
        )
    assert moe.num_moe_experts is not None
    groups = config.num_balance_groups
    if moe.moe_device_aux_loss_num_groups is not None and not moe.moe_device_aux_loss_coeff:
        yield f"moe.moe_device_aux_loss_num_groups={groups} needs moe.moe_device_aux_loss_coeff"
    elif moe.moe_device_aux_loss_coeff and (groups == 1 or moe.num_moe_experts % groups):
        fitting = _divisors(moe.num_moe_experts).removeprefix("1, ")
        yield (
            f"moe.moe_device_aux_loss_coeff={moe.moe_device_aux_loss_coeff} is between groups of "
            f"experts, of which there are {groups}; set moe.moe_device_aux_loss_num_groups to one "
            f"of {fitting}"
        )


def _expert_parallel_rules(config: Config, world_size: int) -> Iterator[str]:
    moe, parallel = config.moe, config.parallel
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    assert moe.num_moe_experts is not None
    if moe.num_moe_experts % ep:
        yield (
            f"parallel.expert_model_parallel_size={ep} does not divide moe.num_moe_experts="
            f"{moe.num_moe_experts}; use one of {_divisors(moe.num_moe_experts)}"
        )
    num_ranks = tp * data_parallel_size(config, world_size)
    if num_ranks % ep or (ep % tp and tp % ep):
        fitting = [n for n in range(1, num_ranks + 1) if not (num_ranks % n or (n % tp and tp % n))]
        yield (
            f"parallel.expert_model_parallel_size={ep} must divide the {num_ranks} tensor x data "
            f"parallel ranks, and divide or be a multiple of tensor_model_parallel_size={tp}; use "
            f"one of {', '.join(map(str, fitting)) or 'none with this many ranks'}"
        )
    if tp > 1 and not parallel.sequence_parallel:
        yield (
            f"experts with parallel.tensor_model_parallel_size={tp} need "
            "parallel.sequence_parallel=true, so that each rank routes its own tokens"
        )
    shared = moe.moe_shared_expert_intermediate_size
    if shared is not None and shared % tp:
        yield (
            f"parallel.tensor_model_parallel_size={tp} does not divide "
            f"moe.moe_shared_expert_intermediate_size={shared}; use one of {_divisors(shared)}"
        )


def _schedule_rules(config: Config) -> Iterator[str]:
    optim, train_iters = config.optim, config.train.train_iters
    end, is_infinite = optim.decay_end(train_iters), optim.lr_decay_style == "infinite"
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr={optim.min_lr} is above optim.lr={optim.lr}"
    if optim.lr_warmup_iters >= end:
        yield (
            f"optim.lr_warmup_iters={optim.lr_warmup_iters} must end before the decay does, at "
            f"step {end} (optim.lr_decay_iters, by default train.train_iters)"
        )
    if optim.lr_decay_style in ("wsd", "infinite"):
        used = optim.lr_warmup_iters + optim.last_decay_iters(train_iters)
        if is_infinite:
            used += optim.cooldown_iters(train_iters)
        if used > end:
            yield (
                f"the parts of lr_decay_style={optim.lr_decay_style} take {used} steps, more than "
                f"the {end} there are; shorten lr_warmup_iters, lr_cooldown_iters or "
                "lr_wsd_decay_iters"
            )
    has_constant = is_infinite or optim.constant_lr is not None
    if has_constant and not optim.min_lr <= optim.constant_rate <= optim.lr:
        yield (
            f"optim.constant_lr={optim.constant_rate} (by default half of lr) must lie between "
            f"min_lr={optim.min_lr} and lr={optim.lr}"
        )


def _batch_rules(config: Config, world_size: int) -> Iterator[str]:
    data, train = config.data, config.train
    capacity, longest = data.micro_batch_tokens, data.max_sequence_length
    dp = data_parallel_size(config, world_size)
    planner = config.parallel.planner
    most = capacity if planner == "packing" else capacity * dp
    if longest > most:
        cure = f"raise tokens_per_rank to {-(-longest * capacity // most)}"
        if planner == "packing" and dp > 1:
            cure += ", set parallel.planner=hdp, which spreads a long sequence over ranks"
        yield (
            f"data.max_sequence_length={longest} does not fit "
            + (
                f"a micro-batch of data.tokens_per_rank={capacity}"
                if planner == "packing"
                else f"{dp} data-parallel ranks x data.tokens_per_rank={capacity}"
            )
            + f"; {cure}, or cut the documents at {most}"
        )
    yield from _planner_rules(config, dp)
    if train.global_batch_tokens is None:
        return
    if train.global_batch_tokens < longest:
        yield (
            f"train.global_batch_tokens={train.global_batch_tokens} cannot hold one sequence of "
            f"data.max_sequence_length={longest}; use at least {longest}"
        )
    if train.num_micro_batches is not None:
        product = train.num_micro_batches * capacity * dp
        if product != train.global_batch_tokens:
            yield (
                f"train.num_micro_batches={train.num_micro_batches} x data.tokens_per_rank="
                f"{capacity} x {dp} data-parallel ranks = {product}, but "
                f"train.global_batch_tokens={train.global_batch_tokens}; leave one of the first "
                "and the last unset and it follows from the others"
            )


def _planner_rules(config: Config, dp: int) -> Iterator[str]:
    parallel = config.parallel
    if parallel.offload_activations and parallel.planner != "hdp":
        yield (
            f"parallel.offload_activations does nothing with parallel.planner={parallel.planner}; "
            "use parallel.planner=hdp, or leave it out"
        )
    if parallel.planner == "megatron" and dp & (dp - 1):
        yield (
            f"parallel.planner=megatron needs a power of two of data-parallel ranks, not {dp}; "
            "use parallel.planner=hdp"
        )
