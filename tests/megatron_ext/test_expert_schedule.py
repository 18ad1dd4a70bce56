"""Training with tokens that travel in chunks equals training on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config_check import check_config
from megatron_ext.errors import UserError
from tests.megatron_ext.layout_settings import EP2, PLAIN, PP2, ZERO1
from tests.megatron_ext.test_config_check import tree_config
from tests.megatron_ext.test_moe_equals_single import BATCH, EP4, MOE, TWO_A_NODE
from tests.megatron_ext.test_parallel_equals_single import TOLERANCE
from tests.megatron_ext.tiny_run import tiny_tree, train_and_report
from tests.rank_pool import Ranks

NUM_STEPS = 2
RECOMPUTED = {"recompute_granularity": "full"}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "EP2, measured": (2, EP2 | PLAIN, {"moe_num_chunks": "auto"}),
    "EP2xDP2+ZeRO-1": (4, EP2 | ZERO1, {"moe_num_chunks": 3, "moe_num_backward_chunks": 2}),
    "EP4 on two nodes": (4, EP4 | PLAIN | TWO_A_NODE, {"moe_num_chunks": 4}),
    "EP2xPP2 recomputed": (4, EP2 | PP2 | PLAIN | RECOMPUTED, {"moe_num_chunks": 2}),
}


@pytest.fixture(scope="module")
def single(ranks: Ranks, corpus: Path) -> dict[str, Any]:
    tree = tiny_tree(corpus, corpus.parent / "single", parallel=PLAIN, moe=MOE, **BATCH)
    return dict(ranks.run(1, train_and_report, tree, NUM_STEPS, megatron=True)[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_equal_a_single_rank(
    ranks: Ranks, corpus: Path, single: dict[str, Any], name: str
) -> None:
    world_size, parallel, chunks = LAYOUTS[name]
    folder = corpus.parent / "chunks"
    tree = tiny_tree(corpus, folder, parallel=parallel, moe=MOE | chunks, **BATCH)
    for report in ranks.run(world_size, train_and_report, tree, NUM_STEPS, megatron=True):
        for key in ("losses", "grad_norms"):
            assert report[key] == pytest.approx(single[key], rel=TOLERANCE), key


EXPERTS = {"moe__num_moe_experts": 4, "parallel__expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moe__num_moe_experts": 4, "moe__moe_num_chunks": 2}, "of which there are none"),
        (
            EXPERTS | {"moe__moe_num_chunks": 2, "moe__moe_token_dispatcher_type": "deep_ep"},
            "deep_ep sends a micro-batch at once",
        ),
        (
            EXPERTS | {"moe__moe_num_chunks": 2, "parallel__grad_reduce_in_gaps": True},
            "grad_reduce_in_gaps=true needs parallel.overlap_grad_reduce",
        ),
        (
            EXPERTS
            | {"parallel__overlap_grad_reduce": True, "parallel__grad_reduce_in_gaps": True},
            "there are gaps where tokens travel in chunks",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_config(tree_config(**changes), world_size=2)
