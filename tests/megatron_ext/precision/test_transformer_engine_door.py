"""Transformer Engine is chosen by name, and missed with a reason."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.precision.linear import low_precision_linear
from megatron_ext.precision.linear_operands import LinearSeeds
from megatron_ext.precision.linear_recipe import linear_recipes
from megatron_ext.precision.transformer_engine_door import (
    TransformerEngineLinear,
    has_transformer_engine,
)
from tests.megatron_ext.layout_settings import PLAIN
from tests.megatron_ext.tiny_run import tiny_config, tiny_tree, train_and_report
from tests.rank_pool import RankError, Ranks

CHOSEN = {"dtype": "fp32", "recipe": "mxfp8", "backend": "transformer_engine"}
needs_absence = pytest.mark.skipif(
    find_spec("transformer_engine") is not None, reason="Transformer Engine is installed"
)


@needs_absence
def test_why_it_is_not_there() -> None:
    found = has_transformer_engine()
    assert not found
    assert "Transformer Engine" in found.reason
    assert "pip install" in found.reason
    with pytest.raises(UserError, match=r"backend=transformer_engine: .* precision\.backend=auto"):
        TransformerEngineLinear(torch.zeros(32, 32), "mxfp8")


@needs_absence
def test_a_run_that_names_it_does_not_start(ranks: Ranks, corpus: Path) -> None:
    tree = tiny_tree(corpus, corpus.parent / "library", parallel=PLAIN, precision=CHOSEN)
    with pytest.raises(RankError, match=r"backend=transformer_engine: .*pip install"):
        ranks.run(1, train_and_report, tree, 1, megatron=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"precision": {"recipe": "quartet"}}, "has no recipe quartet; use fp8_tensorwise"),
        ({"precision": {"operands": {"dgrad_grad": {"rounding": "stochastic"}}}}, "of its own"),
        ({"moe": {"num_moe_experts": 4, "moe_router_topk": 2}}, "multiplies no experts"),
    ],
)
def test_what_it_cannot_do_is_refused(corpus: Path, sections: dict[str, Any], message: str) -> None:
    sections = sections | {"precision": CHOSEN | sections.get("precision", {})}
    with pytest.raises(UserError, match=message):
        tiny_config(tiny_tree(corpus, corpus.parent / "refused", **sections), 1)


def test_it_can_be_chosen_where_it_is_not_installed(corpus: Path) -> None:
    """A plan for another machine is checked here."""
    config = tiny_config(tiny_tree(corpus, corpus.parent / "plan", precision=CHOSEN), 1)
    assert config.precision.backend == "transformer_engine"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8_tensorwise", "fp8_blockwise", "mxfp8", "nvfp4"])
def test_its_products_are_near_ours(name: str) -> None:
    """Both round to the same formats, so both are off by the formats' errors (`test_linear.py`)."""
    if not (found := has_transformer_engine()):
        pytest.skip(found.reason)
    weight = (torch.randn(256, 256, device="cuda") / 16).bfloat16().requires_grad_()
    rows = torch.randn(50, 256, device="cuda").bfloat16()
    theirs = TransformerEngineLinear(weight, name).linear(rows, weight)
    ours = low_precision_linear(rows, weight, linear_recipes()[name], LinearSeeds(1, 2))
    error = float((theirs - ours).float().norm() / ours.float().norm())
    assert error < (0.3 if name == "nvfp4" else 0.1)
