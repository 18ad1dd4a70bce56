"""N ranks equal one rank: losses, gradients and weights of every layout, in float32.

Tolerance: float32 sums in another order differ by about sqrt(n) * 2^-24 relative to the size of
the terms; over the few thousand terms of these sums that is below 1e-5, the bound asked for.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron_ext.layout_settings import PLAIN, PP2, SP, TP2, VPP2, ZERO1
from tests.megatron_ext.tiny_run import tiny_tree, train_and_report

NUM_STEPS = 20
TOLERANCE = 1e-5


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2 | PLAIN),
    "TP2+SP": (2, TP2 | SP | PLAIN),
    "PP2": (2, PP2 | PLAIN),
    "PP2 interleaved": (2, PP2 | VPP2 | PLAIN),
    "DP2": (2, PLAIN),
    "DP2+ZeRO-1": (2, ZERO1),
    "DP2+ZeRO-1 overlapped": (
        2,
        ZERO1
        | {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 4000},
    ),
    "TP2xPP2": (4, TP2 | PP2 | PLAIN),
    "TP2+SPxDP2+ZeRO-1": (4, TP2 | SP | ZERO1),
    "PP2xDP2+ZeRO-1": (4, PP2 | ZERO1),
    "recompute full": (1, {"recompute_granularity": "full"}),
    "recompute selective": (
        1,
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ),
}


@pytest.fixture(scope="module")
def single(ranks: Any, corpus: Path) -> Any:
    """Reports of one rank, by model options."""

    @functools.cache
    def report(options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        tree = tiny_tree(corpus, corpus.parent / "single", parallel=PLAIN, model=dict(options))
        (only,) = ranks.run(1, train_and_report, tree, NUM_STEPS, megatron=True)
        return dict(only)

    return report


def tree_of(corpus: Path, folder: str, layout: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a layout."""
    # Each layer waits for the other rank in each micro-batch: two say as much as four.
    data = {"tokens_per_rank": 512} if layout in {"TP2", "TP2+SP"} else {}
    parallel = LAYOUTS[layout][1]
    return tiny_tree(corpus, corpus.parent / folder, parallel=parallel, data=data, **sections)


def merged(reports: list[dict[str, Any]], key: str, step: int | None = None) -> dict[str, Any]:
    """Parameters of all pipeline stages."""
    whole: dict[str, Any] = {}
    for report in reports:
        whole |= report[key] if step is None else report[key][step]
    return whole


def check_equal(reports: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for report in reports:
        for step, (found, wanted) in enumerate(
            zip(report["losses"], expected["losses"], strict=True)
        ):
            assert abs(found - wanted) <= TOLERANCE, f"loss of step {step}: {found} != {wanted}"
    for step in range(NUM_STEPS):
        grads = merged(reports, "grads", step)
        assert grads.keys() == expected["grads"][step].keys()
        # Relative to the whole gradient: single entries may be sums that cancel.
        difference = math.sqrt(
            sum(
                float((grads[name] - wanted).square().sum())
                for name, wanted in expected["grads"][step].items()
            )
        )
        size = math.sqrt(
            sum(float(wanted.square().sum()) for wanted in expected["grads"][step].values())
        )
        assert difference <= TOLERANCE * size, f"gradients of step {step}: {difference / size:.2e}"
    assert expected["losses"][-1] < expected["losses"][0] - 0.5, "it must have learned something"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_single_rank(ranks: Any, corpus: Path, single: Any, layout: str) -> None:
    tree = tree_of(corpus, "layouts", layout)
    reports = ranks.run(LAYOUTS[layout][0], train_and_report, tree, NUM_STEPS, megatron=True)
    check_equal(reports, single(()))


@pytest.mark.parametrize(
    "options",
    [
        {"norm_position": "reordered", "z_loss_coeff": 1e-3},
        {"untie_embeddings_and_output_weights": False, "qk_layernorm": False},
    ],
    ids=["reordered norm and z-loss", "tied embeddings"],
)
@pytest.mark.parametrize("layout", ["TP2+SP", "PP2"])
def test_model_options_equal_single_rank(
    ranks: Any, corpus: Path, single: Any, layout: str, options: dict[str, Any]
) -> None:
    tree = tree_of(corpus, "options", layout, model=options)
    reports = ranks.run(LAYOUTS[layout][0], train_and_report, tree, NUM_STEPS, megatron=True)
    check_equal(reports, single(tuple(options.items())))


def test_micro_batch_size_does_not_matter(ranks: Any, corpus: Path, single: Any) -> None:
    tree = tiny_tree(corpus, corpus.parent / "cut", parallel=PLAIN, data={"tokens_per_rank": 1024})
    reports = ranks.run(1, train_and_report, tree, NUM_STEPS, megatron=True)
    check_equal(reports, single(()))


def test_initial_weights_do_not_depend_on_the_layout(ranks: Any, corpus: Path) -> None:
    def weights(world_size: int, parallel: dict[str, Any]) -> dict[str, torch.Tensor]:
        tree = tiny_tree(corpus, corpus.parent / "init", parallel=parallel)
        return merged(ranks.run(world_size, train_and_report, tree, 0, megatron=True), "weights")

    expected = weights(1, PLAIN)
    for world_size, parallel in (LAYOUTS["TP2xPP2"], LAYOUTS["PP2 interleaved"]):
        found = weights(world_size, parallel)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
