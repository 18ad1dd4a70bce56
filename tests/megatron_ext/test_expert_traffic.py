"""Bytes to and from experts, and what sending a token once to a rank saves, where it is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron_ext.tiny_run import opened, tiny_tree
from tests.rank_pool import Ranks

HIDDEN_SIZE, FLOAT_BYTES = 32, 4
RECOMPUTED = {"recompute_granularity": "full"}


def steps_after_validation(tree: dict[str, Any]) -> list[dict[str, Any]]:
    from megatron_ext.trainer import train_step
    from megatron_ext.validation import validate

    with opened(tree) as run:
        first = train_step(run)
        # What held-out text sends is no part of the next step.
        validate(run)
        return [dict(first), dict(train_step(run))]


@pytest.mark.parametrize(
    ("topk", "parallel", "num_passes"),
    [(1, {}, 4), (4, {}, 4), (4, RECOMPUTED, 6)],
    ids=["one choice", "all experts", "all experts, recomputed"],
)
def test_a_token_goes_once_to_a_rank(
    ranks: Ranks,
    corpus: Path,
    tmp_path: Path,
    topk: int,
    parallel: dict[str, Any],
    num_passes: int,
) -> None:
    moe = {
        "num_moe_experts": 4,
        "moe_router_topk": topk,
        "moe_router_pre_softmax": True,
        "moe_ffn_hidden_size": 32,
        "moe_layer_freq": [1, 0, 0, 1],
    }
    parallel = {"expert_model_parallel_size": 2} | parallel
    tree = tiny_tree(corpus, tmp_path, moe=moe, parallel=parallel)
    reports = ranks.run(2, steps_after_validation, tree, megatron=True)
    for record in reports[0]:
        sent, saved = record["expert_bytes_sent"], record["expert_bytes_saved"]
        assert len(sent) == len(saved) == 2
        if topk == 1:
            # Nothing can be saved of a single choice.
            assert saved == [0, 0]
            assert all(part > 0 for part in sent)
        else:
            # Each token has two experts on the other rank, and goes there once.
            once = record["tokens"] * HIDDEN_SIZE * FLOAT_BYTES * num_passes
            assert sent == saved == [once, once]


def test_one_rank_has_no_traffic(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    tree = tiny_tree(corpus, tmp_path, moe={"num_moe_experts": 4, "moe_ffn_hidden_size": 32})
    (records,) = ranks.run(1, steps_after_validation, tree, megatron=True)
    assert all("expert_bytes_sent" not in record for record in records)
