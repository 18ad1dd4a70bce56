"""Keys of the balance losses: what goes together, and what megatron's words for it are."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ext.config_check import check_config
from megatron_ext.errors import UserError
from tests.megatron_ext.test_config_check import tree_config

EXPERTS: dict[str, Any] = {"moe__num_moe_experts": 6}
TYPE, COEFF = "moe__moe_router_load_balancing_type", "moe__moe_aux_loss_coeff"
DEVICE, GROUPS = "moe__moe_device_aux_loss_coeff", "moe__moe_device_aux_loss_num_groups"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({TYPE: "seq_aux_loss", COEFF: 0.01}, {"seq_aux_loss": 0.01}),
        (
            # The paper's mix (2501.11873, section 5): 1 % of the loss over micro-batches.
            {TYPE: ["global_aux_loss", "aux_loss"], COEFF: [0.008, 0.00008]},
            {"global_aux_loss": 0.008, "aux_loss": 0.00008},
        ),
        ({TYPE: ["global_aux_loss", "aux_loss"], COEFF: [0.01, 0]}, {"global_aux_loss": 0.01}),
        ({DEVICE: 0.05, GROUPS: 3}, {"device_aux_loss": 0.05}),
    ],
)
def test_coefficients(fields: dict[str, Any], expected: dict[str, float]) -> None:
    config = check_config(tree_config(**EXPERTS, **fields), world_size=1)
    assert config.balance_coefficients == expected


def test_groups_are_expert_parallel_ranks_unless_said() -> None:
    fields = EXPERTS | {DEVICE: 0.05, "parallel__expert_model_parallel_size": 2}
    assert check_config(tree_config(**fields), world_size=2).num_balance_groups == 2
    assert check_config(tree_config(**fields, **{GROUPS: 3}), world_size=2).num_balance_groups == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({COEFF: 0.1}, "does nothing without"),
        ({TYPE: "aux_loss"}, "does nothing with moe.moe_aux_loss_coeff=0"),
        ({TYPE: ["aux_loss"], COEFF: 0.1}, "both must be lists, or neither"),
        ({TYPE: ["aux_loss"], COEFF: [0.1, 0.2]}, "needs as many entries"),
        ({TYPE: ["aux_loss", "aux_loss"], COEFF: [0.1, 0.2]}, "one or more different losses"),
        ({TYPE: ["aux_loss", "none"], COEFF: [0.1, 0.2]}, "one or more different losses"),
        ({TYPE: [], COEFF: []}, "one or more different losses"),
        ({DEVICE: 0.1}, "to one of 2, 3, 6"),
        ({DEVICE: 0.1, GROUPS: 4}, "to one of 2, 3, 6"),
        (
            {TYPE: "aux_loss", COEFF: 0.1, "moe__moe_router_inputs_on_host": True},
            "moe_router_inputs_on_host=true does nothing",
        ),
        ({GROUPS: 2}, "needs moe.moe_device_aux_loss_coeff"),
    ],
)
def test_what_does_not_go_together_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(tree_config(**EXPERTS, **fields), world_size=1)
