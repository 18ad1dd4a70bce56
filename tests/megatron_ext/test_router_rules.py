"""Router settings that contradict each other are refused with what would work."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ext.config_check import check_config
from megatron_ext.errors import UserError
from megatron_ext.planning.megatron_flags import megatron_flags
from megatron_ext.planning.parameters import num_parameters
from megatron_ext.planning.subject import config_model
from tests.megatron_ext.test_config_check import tree_config

EXPERTS: dict[str, Any] = {"moe__num_moe_experts": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True},
            "does nothing with moe.moe_router_score_function=sigmoid",
        ),
        ({"moe_router_enable_expert_bias": True}, "needs moe.moe_router_score_function=sigmoid"),
        (
            {
                "moe_router_enable_expert_bias": True,
                "moe_router_score_function": "sigmoid",
                "moe_router_type": "expert_choice",
            },
            "tokens that choose",
        ),
        ({"moe_router_projection_size": 4}, "is for moe.moe_router_type=x_moe, not topk"),
        (
            {"moe_router_type": "noisy_topk", "moe_router_warmup_steps": 5},
            "two kinds of noise",
        ),
        ({"moe_token_drop_policy": "random"}, "set moe.moe_expert_capacity_factor"),
        ({"moe_router_num_groups": 4}, "set both, or neither"),
        (
            {"moe_router_num_groups": 3, "moe_router_group_topk": 1},
            "8 experts do not make 3 equal groups",
        ),
        (
            {
                "moe_router_num_groups": 4,
                "moe_router_group_topk": 2,
                "moe_router_type": "expert_choice",
            },
            "limit what tokens choose",
        ),
        ({"moe_router_topk": 1}, "set moe.moe_router_pre_softmax=true"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    config = tree_config(**EXPERTS, **{f"moe__{name}": value for name, value in fields.items()})
    with pytest.raises(UserError, match=message):
        check_config(config, world_size=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"},
        {"moe_router_topk": 1, "moe_router_type": "expert_choice"},
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
        },
        {"moe_expert_capacity_factor": 1.25, "moe_token_drop_policy": "random"},
        {"moe_router_type": "x_moe", "moe_router_warmup_steps": 5},
    ],
)
def test_accepted(fields: dict[str, Any]) -> None:
    config = tree_config(**EXPERTS, **{f"moe__{name}": value for name, value in fields.items()})
    check_config(config, world_size=1)


def test_megatron_says_it_so() -> None:
    words = megatron_flags(
        tree_config(
            **EXPERTS,
            moe__moe_router_score_function="sigmoid",
            moe__moe_router_enable_expert_bias=True,
            moe__moe_router_num_groups=4,
            moe__moe_router_group_topk=2,
            moe__moe_expert_capacity_factor=1.5,
            moe__moe_token_drop_policy="position",
        )
    )
    for word in (
        "--moe-router-score-function sigmoid",
        "--moe-router-enable-expert-bias",
        "--moe-router-bias-update-rate 0.001",
        "--moe-router-num-groups 4",
        "--moe-router-group-topk 2",
        "--moe-expert-capacity-factor 1.5",
        "--moe-token-drop-policy position",
    ):
        assert word in words


def test_routers_count_among_the_parameters() -> None:
    def extra(**fields: Any) -> int:
        plain = num_parameters(config_model(tree_config(**EXPERTS), vocab_size=128))
        return (
            num_parameters(config_model(tree_config(**EXPERTS, **fields), vocab_size=128)) - plain
        )

    model = tree_config().model
    layers, h = model.num_layers, model.hidden_size
    assert extra(moe__moe_router_type="noisy_topk") == layers * 8 * h
    # A projection to 4, the experts there and a scale, in the place of [8, hidden_size].
    assert extra(moe__moe_router_type="x_moe") == layers * (4 * h + 8 * 4 + 1 - 8 * h)
