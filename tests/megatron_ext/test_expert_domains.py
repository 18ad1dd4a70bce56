"""What each domain's held-out tokens choose: counted on every layout as on one rank, and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_ext.config import CorpusConfig, DataConfig
from megatron_ext.expert_plot import draw_experts, expert_order, plot_experts, relative_loads
from tests.megatron_ext.tiny_run import make_corpus, opened, tiny_tree
from tests.rank_pool import Ranks

MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# A choice that is a tie within rounding may fall otherwise where sums have another order.
MOST_OTHER_CHOICES = 4

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2+SP": (2, SP2),
    "PP2 interleaved x DP2": (
        4,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "HDP": (2, {"planner": "hdp"}),
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two domains of three corpora; the text is the same in all."""
    path = str(make_corpus(tmp_path_factory.mktemp("corpus")))
    return [{"path": path, "label": "one"}, {"path": path}, {"path": path, "label": "one"}]


def tree_of(corpora: list[dict[str, Any]], run_dir: Path, **sections: Any) -> dict[str, Any]:
    data = {"corpora": corpora, "max_sequence_length": 128, "tokens_per_rank": 1024}
    tree: dict[str, Any] = {"moe": MOE | {"moe_layer_freq": [1, 0, 1, 1]}, "data": data}
    return tiny_tree(Path(), run_dir, **(tree | sections))


def validated(tree: dict[str, Any]) -> dict[str, Any]:
    from megatron_ext.validation import validate

    with opened(tree) as run:
        record = validate(run)
        hooked = [module for chunk in run.chunks for module in chunk.modules()]
        assert not any(getattr(module, "_forward_hooks", None) for module in hooked)
        return dict(record)


def saved(run_dir: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((run_dir / "experts.json").read_text())
    return tree


@pytest.fixture(scope="module")
def single(
    ranks: Ranks, corpora: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("single")
    (record,) = ranks.run(1, validated, tree_of(corpora, run_dir), megatron=True)
    return {"record": record} | saved(run_dir)


def test_every_token_of_a_domain_is_counted_in_every_layer(single: dict[str, Any]) -> None:
    assert single["domains"] == ["one", "corpus"]
    assert single["layers"] == [0, 2, 3]
    choices = np.array(single["counts"]).sum(axis=2)
    # Two corpora of one label are one domain, and all three have the same text.
    assert (choices == choices[0]).all()
    assert choices[0, 0] == 2 * choices[0, 1] > 0
    counts = np.array(single["counts"])
    assert (counts[:, 0] == 2 * counts[:, 1]).all(), "the same text, chosen otherwise"
    assert single["record"]["validation_expert_specialisation"] == pytest.approx([0, 0, 0])
    assert len(single["record"]["validation_expert_top_share"]) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_do_not_depend_on_the_layout(
    ranks: Ranks,
    corpora: list[dict[str, Any]],
    single: dict[str, Any],
    tmp_path: Path,
    layout: str,
) -> None:
    world_size, parallel = LAYOUTS[layout]
    tree = tree_of(corpora, tmp_path, parallel=parallel)
    ranks.run(world_size, validated, tree, megatron=True)
    found, expected = np.array(saved(tmp_path)["counts"]), np.array(single["counts"])
    assert found.sum(axis=2).tolist() == expected.sum(axis=2).tolist()
    assert np.abs(found - expected).sum() <= 2 * MOST_OTHER_CHOICES


def test_a_dense_model_counts_nothing(
    ranks: Ranks, corpora: list[dict[str, Any]], tmp_path: Path
) -> None:
    (record,) = ranks.run(1, validated, tree_of(corpora, tmp_path, moe={}), megatron=True)
    assert set(record) == {"validation_loss", "validation_bits_per_byte"}
    assert not (tmp_path / "experts.json").exists()


def train_here(tree: dict[str, Any]) -> None:
    from megatron_ext.trainer import train

    with opened(tree) as run:
        train(run)


def test_a_run_tells_the_load_of_each_step_and_draws_the_domains(
    ranks: Ranks, corpora: list[dict[str, Any]], tmp_path: Path
) -> None:
    train = {"train_iters": 3, "global_batch_tokens": 1024, "eval_tokens": 500}
    parallel = {"pipeline_model_parallel_size": 2}
    ranks.run(
        2, train_here, tree_of(corpora, tmp_path, train=train, parallel=parallel), megatron=True
    )
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, _, last = map(json.loads, lines)
    for record in (first, last):
        # All three layers, which are on two stages.
        assert len(record["expert_load_max_over_mean"]) == 3
        assert all(1 <= load <= 2 for load in record["expert_load_max_over_mean"])
        assert all(0 < entropy <= 1 for entropy in record["expert_load_entropy"])
        assert record["expert_dropped_share"] == [0, 0, 0]
    assert "validation_expert_specialisation" not in first
    assert saved(tmp_path)["step"] == 3
    assert imread(tmp_path / "plots" / "experts.png").std() > 0.01


def test_labels() -> None:
    corpora = [
        CorpusConfig(path="a/code/"),
        CorpusConfig(path="b/other", label="code"),
        CorpusConfig(path="b/talk"),
    ]
    assert DataConfig(corpora=corpora).domains == ("code", "talk")


def test_experts_of_a_domain_stand_side_by_side() -> None:
    counts = np.array([[0, 8, 0, 4], [6, 0, 12, 0]])
    loads = relative_loads(counts)
    assert loads.sum(axis=1).tolist() == [4, 4]
    assert expert_order(loads) == [1, 3, 2, 0]


def test_pictures_of_many_layers_and_of_several_runs(tmp_path: Path) -> None:
    tree = {
        "domains": ["a", "b"],
        "layers": list(range(40)),
        "specialisation": [0.1] * 40,
        "counts": np.random.default_rng(0).integers(0, 9, (40, 2, 6)).tolist(),
    }
    assert plot_experts(tmp_path / "experts.json", tmp_path / "none.png") is None
    (tmp_path / "experts.json").write_text(json.dumps(tree))
    assert plot_experts(tmp_path / "experts.json", tmp_path / "plots" / "one.png")
    draw_experts([("x", tree), ("y", tree), ("z", tree)], tmp_path / "three.png")
    one, three = imread(tmp_path / "plots" / "one.png"), imread(tmp_path / "three.png")
    # Twelve layers at most: in six rows of two, or one below the other.
    assert three.shape[0] > 1.5 * one.shape[0]
