"""A run with experts goes on where it was saved, on the same ranks or on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron_ext.layout_settings import EP2, PLAIN, PP2, SP, TP2, ZERO1
from tests.megatron_ext.test_moe_equals_single import DEEPSEEK, EP4, MOE
from tests.megatron_ext.test_resume import resume_train, train_save_train
from tests.megatron_ext.tiny_run import tiny_tree
from tests.rank_pool import RankError, Ranks

Layout = tuple[int, dict[str, Any]]


@pytest.mark.parametrize(
    ("before", "after", "sections"),
    [
        ((2, EP2 | ZERO1), (2, EP2 | ZERO1), {"moe": MOE}),
        ((4, EP2 | ZERO1), (4, EP4 | PLAIN), {"moe": MOE}),
        ((1, PLAIN), (2, EP2 | TP2 | SP | ZERO1), DEEPSEEK),
        ((4, EP2 | PP2 | ZERO1), (2, EP2 | PLAIN), DEEPSEEK),
        ((2, EP2 | ZERO1), (2, PP2 | ZERO1), DEEPSEEK | {"precision": {"dtype": "bf16"}}),
    ],
    ids=["same", "EP2xDP2-EP4", "1-EP2xTP2", "EP2xPP2-EP2", "bf16 EP2-PP2"],
)
def test_resume(
    ranks: Ranks,
    corpus: Path,
    tmp_path: Path,
    before: Layout,
    after: Layout,
    sections: dict[str, Any],
) -> None:
    run_dir = tmp_path / "run"
    first = tiny_tree(corpus, run_dir, parallel=before[1], **sections)
    second = tiny_tree(corpus, run_dir, parallel=after[1], **sections)
    expected = ranks.run(before[0], train_save_train, first, 3, 2, megatron=True)[0]
    # In bf16 another layout rounds differently.
    tolerance = 1e-2 if "precision" in sections else 1e-5
    for losses in ranks.run(after[0], resume_train, second, 2, megatron=True):
        assert losses == pytest.approx(expected, abs=tolerance)


def test_other_experts_are_refused(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    tree = tiny_tree(corpus, tmp_path / "run", moe=MOE)
    ranks.run(1, train_save_train, tree, 1, 0, megatron=True)
    other = tiny_tree(corpus, tmp_path / "run", moe=MOE | {"moe_router_topk": 3})
    with pytest.raises(RankError, match=r"moe\.moe_router_topk: 2 there, 3 here"):
        ranks.run(1, resume_train, other, 1, megatron=True)
