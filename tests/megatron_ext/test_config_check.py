"""Every rule between fields: what breaks it, what the message says, and that the cure works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import Config
from megatron_ext.config_check import check_config, data_parallel_size
from megatron_ext.config_file import check_tree
from megatron_ext.errors import UserError


def tree_config(**fields: Any) -> Config:
    """A small configuration; a name such as model__num_layers sets one field."""
    tree: dict[str, Any] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
        },
        "data": {"corpora": [{"path": "corpus"}], "max_sequence_length": 128},
        "train": {"train_iters": 100},
        "optim": {"lr": 1e-3},
    }
    for name, value in fields.items():
        section, _, key = name.partition("__")
        tree.setdefault(section, {})[key] = value
    return check_tree(tree, where="test")


@dataclass(frozen=True)
class Rule:
    """Fields that break a rule, what the text must hold, and the change that mends it."""

    name: str
    broken: dict[str, Any]
    said: Sequence[str]
    cure: dict[str, Any]
    world_size: int = 1
    cured_world_size: int | None = None


TP2 = {"parallel__tensor_model_parallel_size": 2}
PP2 = {"parallel__pipeline_model_parallel_size": 2}
VPP2 = {"parallel__virtual_pipeline_model_parallel_size": 2}

RULES = [
    Rule(
        "hidden size and heads",
        {"model__num_attention_heads": 5},
        ["model.num_attention_heads=5 does not divide model.hidden_size=64", "use one of 1, 2, 4"],
        {"model__num_attention_heads": 8},
    ),
    Rule(
        "hidden size and heads, other cure",
        {"model__num_attention_heads": 5},
        ["or set kv_channels"],
        {"model__kv_channels": 16},
    ),
    Rule(
        "odd width of a head",
        {"model__kv_channels": 15},
        ["the width of a head is 15", "set model.kv_channels to an even number such as 16"],
        {"model__kv_channels": 16},
    ),
    Rule(
        "query groups",
        {"model__num_query_groups": 3},
        ["model.num_query_groups=3 does not divide model.num_attention_heads=4", "1, 2, 4"],
        {"model__num_query_groups": 2},
    ),
    Rule(
        "tensor parallel size and heads",
        {"model__hidden_size": 48, "model__num_attention_heads": 3} | TP2,
        ["tensor_model_parallel_size=2 does not divide model.num_attention_heads=3", "1, 3"],
        {"model__num_attention_heads": 4},
        world_size=2,
    ),
    Rule(
        "tensor parallel size and query groups",
        {"model__num_query_groups": 1} | TP2,
        ["tensor_model_parallel_size=2 does not divide model.num_query_groups=1", "use one of 1"],
        {"model__num_query_groups": 2},
        world_size=2,
    ),
    Rule(
        "tensor parallel size and feed-forward width",
        {"model__ffn_hidden_size": 129} | TP2,
        ["tensor_model_parallel_size=2 does not divide model.ffn_hidden_size=129", "1, 3, 43"],
        {"model__ffn_hidden_size": 130},
        world_size=2,
    ),
    Rule(
        "tensor parallel size and vocabulary",
        {"model__make_vocab_size_divisible_by": 1} | TP2,
        ["does not divide model.make_vocab_size_divisible_by=1"],
        {"model__make_vocab_size_divisible_by": 2},
        world_size=2,
    ),
    Rule(
        "ranks and model parallel size",
        TP2 | PP2,
        ["6 ranks cannot be divided", "2 x 2 = 4", "use a multiple of 4 ranks (--ranks)"],
        {},
        world_size=6,
        cured_world_size=8,
    ),
    Rule(
        "sequence parallel alone",
        {"parallel__sequence_parallel": True},
        ["parallel.sequence_parallel needs parallel.tensor_model_parallel_size of 2 or more"],
        {"parallel__sequence_parallel": False},
    ),
    Rule(
        "sequence parallel and micro-batch",
        {"parallel__sequence_parallel": True, "data__tokens_per_rank": 129} | TP2,
        ["data.tokens_per_rank=129 is not a multiple of parallel.tensor_model_parallel_size=2"],
        {"data__tokens_per_rank": 130},
        world_size=2,
    ),
    Rule(
        "overlapped gather without ZeRO",
        {
            "parallel__overlap_param_gather": True,
            "parallel__overlap_grad_reduce": True,
            "parallel__use_distributed_optimizer": False,
        },
        ["parallel.overlap_param_gather needs parallel.use_distributed_optimizer=true"],
        {"parallel__use_distributed_optimizer": True},
    ),
    Rule(
        "overlapped gather without overlapped reduction",
        {"parallel__overlap_param_gather": True},
        ["and parallel.overlap_grad_reduce=true"],
        {"parallel__overlap_grad_reduce": True},
    ),
    Rule(
        "interleaving without pipeline",
        VPP2,
        ["virtual_pipeline_model_parallel_size=2 needs", "pipeline_model_parallel_size of 2"],
        PP2,
        cured_world_size=2,
    ),
    Rule(
        "layers and stages",
        {"model__num_layers": 5} | PP2,
        ["model.num_layers=5 cannot be spread evenly over 2 pipeline stages x 1 chunks", "1, 5"],
        {"model__num_layers": 6},
        world_size=2,
    ),
    Rule(
        "layers, stages and chunks",
        {"model__num_layers": 6} | PP2 | VPP2,
        ["2 pipeline stages x 2 chunks; use a multiple of 4 layers"],
        {"model__num_layers": 8},
        world_size=2,
    ),
    Rule(
        "layers recomputed together",
        {
            "model__num_layers": 8,
            "parallel__recompute_granularity": "full",
            "parallel__recompute_num_layers": 3,
        }
        | PP2,
        ["parallel.recompute_num_layers=3 does not divide the 4 layers", "use one of 1, 2, 4"],
        {"parallel__recompute_num_layers": 2},
        world_size=2,
    ),
    Rule(
        "smallest learning rate",
        {"optim__min_lr": 2e-3},
        ["optim.min_lr=0.002 is above optim.lr=0.001"],
        {"optim__min_lr": 1e-3},
    ),
    Rule(
        "warm-up and steps",
        {"optim__lr_warmup_iters": 100},
        ["optim.lr_warmup_iters=100 must end before the decay does, at step 100"],
        {"optim__lr_warmup_iters": 99},
    ),
    Rule(
        "warm-up and decay",
        {"optim__lr_warmup_iters": 50, "optim__lr_decay_iters": 50},
        ["at step 50 (optim.lr_decay_iters, by default train.train_iters)"],
        {"optim__lr_decay_iters": 51},
    ),
    Rule(
        "parts of wsd",
        {
            "optim__lr_decay_style": "wsd",
            "optim__lr_warmup_iters": 50,
            "optim__lr_wsd_decay_iters": 51,
        },
        ["lr_decay_style=wsd take 101 steps, more than the 100 there are", "lr_wsd_decay_iters"],
        {"optim__lr_wsd_decay_iters": 50},
    ),
    Rule(
        "parts of infinite",
        {
            "optim__lr_decay_style": "infinite",
            "optim__lr_cooldown_iters": 60,
            "optim__lr_wsd_decay_iters": 50,
        },
        ["lr_decay_style=infinite take 110 steps", "shorten lr_warmup_iters, lr_cooldown_iters"],
        {"optim__lr_cooldown_iters": 50},
    ),
    Rule(
        "constant part too high",
        {"optim__constant_lr": 2e-3},
        ["optim.constant_lr=0.002", "must lie between min_lr=0.0 and lr=0.001"],
        {"optim__constant_lr": 1e-3},
    ),
    Rule(
        "constant part too low by default",
        {"optim__lr_decay_style": "infinite", "optim__min_lr": 6e-4},
        ["optim.constant_lr=0.0005 (by default half of lr) must lie between min_lr=0.0006"],
        {"optim__constant_lr": 6e-4},
    ),
    Rule(
        "sequence and micro-batch",
        {"data__tokens_per_rank": 127},
        ["data.max_sequence_length=128 does not fit", "raise tokens_per_rank to 128", "cut"],
        {"data__tokens_per_rank": 128},
    ),
    Rule(
        "sequence and ranks that share it",
        {"parallel__planner": "hdp", "data__tokens_per_rank": 32},
        ["does not fit 2 data-parallel ranks x data.tokens_per_rank=32", "tokens_per_rank to 64"],
        {"data__tokens_per_rank": 64},
        world_size=2,
    ),
    Rule(
        "packing where sharing would do",
        {"data__tokens_per_rank": 64},
        ["set parallel.planner=hdp, which spreads a long sequence over ranks"],
        {"parallel__planner": "hdp"},
        world_size=2,
    ),
    Rule(
        "offload without anyone who plans it",
        {"parallel__offload_activations": True},
        ["parallel.offload_activations does nothing with parallel.planner=packing"],
        {"parallel__planner": "hdp"},
    ),
    Rule(
        "megatron's planner wants a power of two",
        {"parallel__planner": "megatron"},
        ["needs a power of two of data-parallel ranks, not 3", "parallel.planner=hdp"],
        {"parallel__planner": "hdp"},
        world_size=3,
    ),
    Rule(
        "sequence and global batch",
        {"train__global_batch_tokens": 127},
        ["train.global_batch_tokens=127 cannot hold one sequence", "use at least 128"],
        {"train__global_batch_tokens": 128},
    ),
    Rule(
        "batch arithmetic",
        {"train__num_micro_batches": 3, "train__global_batch_tokens": 512},
        ["3 x data.tokens_per_rank=128 x 2 data-parallel ranks = 768", "global_batch_tokens=512"],
        {"train__global_batch_tokens": 768},
        world_size=2,
    ),
]

EXPERTS: dict[str, Any] = {"moe__num_moe_experts": 4}
EP2 = {"parallel__expert_model_parallel_size": 2}

MOE_RULES = [
    Rule(
        "fields without experts",
        {"moe__moe_router_topk": 4},
        ["moe.moe_router_topk is set", "set moe.num_moe_experts"],
        EXPERTS,
    ),
    Rule(
        "expert parallel without experts",
        EP2,
        ["expert_model_parallel_size=2 needs experts"],
        EXPERTS,
        world_size=2,
    ),
    Rule(
        "more chosen than there are",
        EXPERTS | {"moe__moe_router_topk": 5},
        ["moe.moe_router_topk=5 is more than moe.num_moe_experts=4"],
        {"moe__moe_router_topk": 4},
    ),
    Rule(
        "one chosen and renormalised",
        EXPERTS | {"moe__moe_router_topk": 1},
        ["would not learn", "set moe.moe_router_pre_softmax=true"],
        {"moe__moe_router_pre_softmax": True},
    ),
    Rule(
        "no layer",
        EXPERTS | {"moe__moe_layer_freq": 0},
        ["moe.moe_layer_freq=0: at least 1"],
        {"moe__moe_layer_freq": 2},
    ),
    Rule(
        "pattern of another length",
        EXPERTS | {"moe__moe_layer_freq": [0, 1]},
        ["moe.moe_layer_freq has 2 entries for model.num_layers=4"],
        {"moe__moe_layer_freq": [0, 1, 1, 1]},
    ),
    Rule(
        "pattern without experts",
        EXPERTS | {"moe__moe_layer_freq": [0, 0, 0, 0]},
        ["gives experts to no layer"],
        {"moe__moe_layer_freq": [0, 0, 0, 1]},
    ),
    Rule(
        "experts that cannot be shared evenly",
        {"moe__num_moe_experts": 3} | EP2,
        ["expert_model_parallel_size=2 does not divide moe.num_moe_experts=3", "one of 1, 3"],
        {"moe__num_moe_experts": 6},
        world_size=2,
    ),
    Rule(
        "expert parallel and ranks",
        {"moe__num_moe_experts": 12, "parallel__expert_model_parallel_size": 4},
        ["=4 must divide the 6 tensor x data parallel ranks", "use one of 1, 2, 3, 6"],
        {"parallel__expert_model_parallel_size": 3},
        world_size=6,
    ),
    Rule(
        "expert parallel across tensor parallel",
        {"moe__num_moe_experts": 12, "parallel__expert_model_parallel_size": 3}
        | TP2
        | {"parallel__sequence_parallel": True},
        ["=3 must divide the 6", "multiple of tensor_model_parallel_size=2; use one of 1, 2, 6"],
        {"parallel__expert_model_parallel_size": 6},
        world_size=6,
    ),
    Rule(
        "tensor without sequence parallel",
        EXPERTS | TP2,
        ["need parallel.sequence_parallel=true"],
        {"parallel__sequence_parallel": True},
        world_size=2,
    ),
    Rule(
        "shared experts and tensor parallel",
        EXPERTS
        | TP2
        | {"parallel__sequence_parallel": True, "moe__moe_shared_expert_intermediate_size": 15},
        ["does not divide moe.moe_shared_expert_intermediate_size=15; use one of 1, 3, 5, 15"],
        {"moe__moe_shared_expert_intermediate_size": 16},
        world_size=2,
    ),
]


@pytest.mark.parametrize("rule", [*RULES, *MOE_RULES], ids=lambda rule: rule.name)
def test_broken_rule_names_its_cure(rule: Rule) -> None:
    with pytest.raises(UserError) as caught:
        check_config(tree_config(**rule.broken), world_size=rule.world_size)
    message = str(caught.value)
    assert message.startswith("this configuration cannot run:\n  ")
    assert message.count("\n") == 1, "nothing else is wrong"
    for text in rule.said:
        assert text in message
    cured_world_size = rule.cured_world_size or rule.world_size
    check_config(tree_config(**rule.broken | rule.cure), world_size=cured_world_size)


@pytest.mark.parametrize("world_size", [0, -1])
def test_a_run_has_ranks(world_size: int) -> None:
    with pytest.raises(UserError, match=f"--ranks {world_size}: at least 1"):
        check_config(tree_config(), world_size=world_size)


def test_all_broken_rules_are_told_together() -> None:
    config = tree_config(
        model__num_attention_heads=3, optim__min_lr=1.0, parallel__tensor_model_parallel_size=2
    )
    with pytest.raises(UserError) as caught:
        check_config(config, world_size=3)
    message = str(caught.value)
    for text in ("num_attention_heads=3 does not divide", "3 ranks cannot", "optim.min_lr=1.0"):
        assert text in message


def test_what_follows_is_filled_in() -> None:
    layout = TP2 | PP2
    filled = check_config(tree_config(train__num_micro_batches=3, **layout), world_size=8)
    assert data_parallel_size(filled, 8) == 2
    assert filled.data.tokens_per_rank == 128
    assert filled.train.global_batch_tokens == 3 * 128 * 2
    one = check_config(tree_config(data__tokens_per_rank=256), world_size=4)
    assert one.train.global_batch_tokens == 256 * 4
    given_tokens = check_config(tree_config(train__global_batch_tokens=1000), world_size=4)
    assert given_tokens.train.global_batch_tokens == 1000


@given(
    layers=st.integers(1, 12),
    heads=st.integers(1, 8),
    tensor=st.integers(1, 4),
    pipeline=st.integers(1, 4),
    world_size=st.integers(1, 16),
    micro_batches=st.none() | st.integers(1, 5),
)
def test_a_checked_configuration_divides_evenly(
    layers: int,
    heads: int,
    tensor: int,
    pipeline: int,
    world_size: int,
    micro_batches: int | None,
) -> None:
    config = tree_config(
        model__num_layers=layers,
        model__num_attention_heads=heads,
        model__kv_channels=8,
        model__ffn_hidden_size=24,
        model__make_vocab_size_divisible_by=12,
        parallel__tensor_model_parallel_size=tensor,
        parallel__pipeline_model_parallel_size=pipeline,
        train__num_micro_batches=micro_batches,
    )
    fits = not (heads % tensor or layers % pipeline or world_size % (tensor * pipeline))
    try:
        checked = check_config(config, world_size=world_size)
    except UserError:
        assert not fits
        return
    assert fits
    tokens = 128 * (micro_batches or 1) * (world_size // (tensor * pipeline))
    assert checked.train.global_batch_tokens == tokens
    # What has been filled in agrees with itself.
    assert check_config(checked, world_size=world_size) == checked
