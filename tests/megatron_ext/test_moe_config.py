"""What follows from the section `moe`: layers with experts, sizes, megatron's words for it."""

from __future__ import annotations

import pytest
import yaml

from megatron_ext.config_check import check_config
from megatron_ext.config_file import check_tree, dump_config
from megatron_ext.planning.megatron_flags import megatron_flags
from megatron_ext.planning.parameters import num_parameters
from megatron_ext.planning.subject import config_model
from tests.megatron_ext.test_config_check import tree_config
from tests.rank_pool import Ranks

MIXTRAL_8X7B = {
    "model__num_layers": 32,
    "model__hidden_size": 4096,
    "model__ffn_hidden_size": 14336,
    "model__num_attention_heads": 32,
    "model__num_query_groups": 8,
    "moe__num_moe_experts": 8,
    "moe__moe_router_topk": 2,
}
DEEPSEEK_MOE_16B = {
    "model__num_layers": 28,
    "model__hidden_size": 2048,
    "model__ffn_hidden_size": 10944,
    "model__num_attention_heads": 16,
    "moe__num_moe_experts": 64,
    "moe__moe_router_topk": 6,
    "moe__moe_ffn_hidden_size": 1408,
    "moe__moe_shared_expert_intermediate_size": 2 * 1408,
    "moe__moe_layer_freq": [0] + [1] * 27,
    "moe__moe_router_pre_softmax": True,
}


@pytest.mark.parametrize(
    ("freq", "layers"),
    [
        (1, [True, True, True, True]),
        (2, [True, False, True, False]),
        (3, [True, False, False, True]),
        ([0, 1, 1, 0], [False, True, True, False]),
    ],
)
def test_which_layers_have_experts(freq: int | list[int], layers: list[bool]) -> None:
    assert tree_config(moe__num_moe_experts=2, moe__moe_layer_freq=freq).moe_layers == layers
    assert not any(tree_config().moe_layers)


def test_published_models_have_their_published_sizes() -> None:
    # Their files on Hugging Face: 46,702,792,704 and 16,375,728,128 parameters.
    mixtral = config_model(tree_config(**MIXTRAL_8X7B), vocab_size=32000)
    assert num_parameters(mixtral) == 46_702_792_704
    deepseek = config_model(tree_config(**DEEPSEEK_MOE_16B), vocab_size=102400)
    assert num_parameters(deepseek) == 16_375_728_128


def active_parameters(fields: dict[str, object], vocab_size: int) -> int:
    from megatron_ext.model_shape import model_shape

    return model_shape(tree_config(**fields), vocab_size).matmul_parameters


def test_flops_count_what_one_token_meets(ranks: Ranks) -> None:
    (mixtral,) = ranks.run(1, active_parameters, MIXTRAL_8X7B, 32000, megatron=True)
    attention = 4096 * (2 * 4096 + 2 * 1024)
    layer = attention + 2 * 3 * 4096 * 14336 + 8 * 4096
    assert mixtral == 32 * layer + 4096 * 32000
    (deepseek,) = ranks.run(1, active_parameters, DEEPSEEK_MOE_16B, 102400, megatron=True)
    attention = 4 * 2048 * 2048
    first = attention + 3 * 2048 * 10944
    layer = attention + (6 + 2) * 3 * 2048 * 1408 + 64 * 2048
    assert deepseek == first + 27 * layer + 2048 * 102400


def test_megatron_says_it_so() -> None:
    words = megatron_flags(tree_config(**DEEPSEEK_MOE_16B))
    for word in (
        "--num-experts 64",
        "--moe-router-topk 6",
        "--moe-router-pre-softmax",
        "--moe-router-load-balancing-type none",
    ):
        assert word in words
    pattern = "[0," + ",".join(["1"] * 27) + "]"
    assert f"--moe-layer-freq {pattern}" in words
    assert not any("moe" in word for word in megatron_flags(tree_config()))
    mixed = DEEPSEEK_MOE_16B | {
        "moe__moe_router_load_balancing_type": ["global_aux_loss", "aux_loss"],
        "moe__moe_aux_loss_coeff": [0.01, 0.0001],
    }
    words = megatron_flags(tree_config(**mixed))
    assert "--moe-router-load-balancing-type global_aux_loss aux_loss" in words
    assert "--moe-aux-loss-coeff 0.01 0.0001" in words


def test_a_saved_tree_is_read_back() -> None:
    config = tree_config(**DEEPSEEK_MOE_16B)
    assert check_tree(yaml.safe_load(dump_config(config)), where="saved") == config
    # A dense one names the fields of `moe` with their defaults, which is no reason to refuse it.
    dense = check_tree(yaml.safe_load(dump_config(tree_config())), where="saved")
    check_config(dense, world_size=1)
