"""Several steps with balance over the global batch: N ranks equal one, also in the hidden states.

From the second step on the hidden states get the gradient of the balance loss with the load of the
step before. A resumed run has that load too.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.megatron_ext.layout_settings import EP2, PLAIN, PP2, ZERO1
from tests.megatron_ext.test_moe_equals_single import (
    BATCH,
    LAYOUTS,
    MOE,
    Single,
    check_equal,
    train_with_margins,
)
from tests.megatron_ext.test_resume import resume_train, train_save_train
from tests.megatron_ext.tiny_run import tiny_tree, train_and_report
from tests.rank_pool import Ranks

NUM_STEPS = 5
# Ten times what is usual, so that a wrong term is seen.
BALANCED: dict[str, Any] = {
    "moe": MOE
    | {
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_device_aux_loss_coeff": 0.1,
        "moe_device_aux_loss_num_groups": 2,
    }
}


@pytest.fixture(scope="module")
def single(ranks: Ranks, corpus: Path) -> Single:
    """Reports of one rank."""

    @functools.cache
    def report(name: str) -> dict[str, Any]:
        tree = tiny_tree(corpus, corpus.parent / name, parallel=PLAIN, **BATCH, **BALANCED)
        return dict(ranks.run(1, train_with_margins, tree, megatron=True)[0])

    return report


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("EP2xDP2+ZeRO-1 overlapped", {}),
        ("EP2xTP2+SPxDP2", {}),
        ("EP2xPP2 interleaved+ZeRO-1", {}),
        ("EP1xDP2+ZeRO-1", {"recompute_granularity": "full"}),
        ("EP2xDP2", {"planner": "hdp"}),
    ],
)
def test_layout_equals_single_rank(
    ranks: Ranks, corpus: Path, single: Single, layout: str, more: dict[str, Any]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    # Most sequences are longer than what one rank holds, and ranks share them.
    data = {"tokens_per_rank": 96} if "planner" in more else {}
    tree = tiny_tree(
        corpus, corpus.parent / "run", parallel=parallel | more, data=data, **BATCH, **BALANCED
    )
    reports = ranks.run(world_size, train_and_report, tree, NUM_STEPS, megatron=True)
    check_equal(reports, single("single"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, EP2 | ZERO1), (2, EP2 | ZERO1)),
        ((4, EP2 | PP2 | ZERO1), (1, PLAIN)),
    ],
    ids=["same", "EP2xPP2-1"],
)
def test_resume_has_the_load_of_the_step_before(
    ranks: Ranks,
    corpus: Path,
    tmp_path: Path,
    before: tuple[int, dict[str, Any]],
    after: tuple[int, dict[str, Any]],
) -> None:
    # So large that steps differ in the fourth digit without that load.
    moe = BALANCED["moe"] | {"moe_aux_loss_coeff": 3.0}
    first = tiny_tree(corpus, tmp_path / "run", parallel=before[1], moe=moe)
    second = tiny_tree(corpus, tmp_path / "run", parallel=after[1], moe=moe)
    expected = ranks.run(before[0], train_save_train, first, 3, 2, megatron=True)[0]
    for losses in ranks.run(after[0], resume_train, second, 2, megatron=True):
        assert losses == (expected if before == after else pytest.approx(expected, abs=1e-5))
