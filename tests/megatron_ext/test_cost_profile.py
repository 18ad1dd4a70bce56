"""Cost profiles: written, read back, refused where they belong to something else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.config_file import check_tree
from megatron_ext.cost_profile import CostProfile, load_cost_model, read_cost_profile
from megatron_ext.errors import UserError
from parallel.plan.communication import RingCost
from tests.megatron_ext.tiny_run import make_corpus, opened, tiny_tree
from tests.rank_pool import Ranks

SUBJECT: dict[str, str | int] = {"device": "a CPU", "dtype": "torch.float32", "num_layers": 4}
PROFILE = CostProfile(
    subject=SUBJECT,
    quadratic_seconds=1e-9,
    linear_seconds=1e-5,
    fixed_seconds=1e-3,
    communication=RingCost(bytes_per_second=1e9, key_value_bytes=512.0, num_query_groups=2),
    date="2026-11-23",
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "profile.json"
    PROFILE.write(path)
    assert read_cost_profile(path) == PROFILE
    model = load_cost_model(path, subject=SUBJECT)
    assert model == PROFILE.cost_model
    assert model.communication == PROFILE.communication


def test_a_profile_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    PROFILE.write(path)
    with pytest.raises(UserError, match=r"num_layers: 4 there, 8 here"):
        load_cost_model(path, subject=SUBJECT | {"num_layers": 8})


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}", '{"format_version": 1}', json.dumps({"format_version": 99})],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.json: not a cost profile"):
        read_cost_profile(path)
    with pytest.raises(UserError, match=r"absent\.json: not a cost profile"):
        read_cost_profile(tmp_path / "absent.json")


@pytest.mark.parametrize("broken", [{"linear_seconds": float("nan")}, {"fixed_seconds": -1.0}])
def test_constants_that_compare_no_plans_are_refused(
    tmp_path: Path, broken: dict[str, float]
) -> None:
    path = tmp_path / "broken.json"
    PROFILE.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | broken))
    with pytest.raises(
        UserError, match=rf"broken\.json: not a cost profile \({next(iter(broken))}"
    ):
        read_cost_profile(path)


def test_everything_that_costs_is_told_apart() -> None:
    from megatron_ext.cost_profile import subject_of

    base: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
        },
        "data": {"corpora": [{"path": "corpus"}]},
        "moe": {"num_moe_experts": 4, "moe_router_topk": 2},
    }
    changes: list[dict[str, dict[str, Any]]] = [
        {},
        {"moe": {}},
        {"moe": {"num_moe_experts": 8, "moe_router_topk": 2}},
        {"moe": {"num_moe_experts": 4, "moe_router_topk": 1}},
        {"moe": base["moe"] | {"moe_layer_freq": 2}},
        {"parallel": {"expert_model_parallel_size": 2}},
        {"parallel": {"recompute_granularity": "selective"}},
        {
            "parallel": {
                "recompute_granularity": "selective",
                "recompute_modules": ["core_attn", "mlp"],
            }
        },
    ]
    subjects = [
        subject_of(check_tree(base | change, where="test"), device="", dtype="", vocab_size=256)
        for change in changes
    ]
    assert all(subjects.count(subject) == 1 for subject in subjects)


def test_constants_are_recovered_from_exact_times() -> None:
    from megatron_ext.profile import _fit, _packs

    packs = _packs(4096)
    assert max(map(sum, packs)) <= 4096
    truth = (3e-9, 2e-5, 4e-3)
    seconds = [
        truth[0] * sum(s * s for s in lengths) + truth[1] * sum(lengths) + truth[2]
        for lengths in packs
    ]
    assert np.allclose(_fit(packs, seconds), truth, rtol=1e-6)
    # No term may be negative, whatever noise says.
    shrinking = _fit(packs, [1.0 / (1 + sum(lengths)) for lengths in packs])
    assert min(shrinking) >= 0.0
    assert max(shrinking[:2]) > 0.0
    noise = random.Random(1)
    for _ in range(200):
        found = _fit(packs, [noise.uniform(1e-3, 2e-3) for _ in packs])
        assert min(found) >= 0.0
        assert max(found[:2]) > 0.0


def profile_and_plan(tree: dict[str, Any], path: str) -> dict[str, float]:
    from megatron_ext.profile import profile

    with opened(tree) as run:
        assert profile(run) == 0
    tree = tree | {"parallel": {"cost_profile": path, "planner": "hdp"}}
    with opened(tree) as run:
        costs = run.costs.cost_model
        assert costs.communication is not None
        run.loader.take(is_last=True)
        return {
            "linear_seconds": costs.linear_seconds,
            "bytes_per_second": costs.communication.bytes_per_second,
        }


def test_measured_on_ranks_and_used_by_them(ranks: Ranks, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    tree = tiny_tree(corpus, tmp_path / "run")
    found = ranks.run(
        2, profile_and_plan, tree, str(tmp_path / "run" / "cost_profile.json"), megatron=True
    )
    assert found[0] == found[1], "all ranks plan with the same numbers"
    assert found[0]["bytes_per_second"] > 0
