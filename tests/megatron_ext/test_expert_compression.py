"""Compressed dispatch in a run: from which step, in which layers, on which ranks, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config_check import check_config
from megatron_ext.errors import UserError
from tests.megatron_ext.layout_settings import EP2, PLAIN, ZERO1
from tests.megatron_ext.test_config_check import tree_config
from tests.megatron_ext.test_moe_equals_single import MOE, norm_of
from tests.megatron_ext.test_parallel_equals_single import merged
from tests.megatron_ext.test_resume import resume_train, train_save_train
from tests.megatron_ext.tiny_run import opened, tiny_tree, train_and_report
from tests.rank_pool import Ranks

LSH = {"moe_lsh_num_hashes": 3, "moe_lsh_hash_dim": 2}


def step_records(tree: dict[str, Any], num_steps: int) -> list[dict[str, Any]]:
    from megatron_ext.trainer import train_step
    from megatron_ext.validation import validate

    with opened(tree) as run:
        records = [dict(train_step(run)) for _ in range(num_steps)]
        exact = validate(run)
        if run.compression is not None:
            run.compression.replace_exact()
        compressed = validate(run)
        for name, record in (("exact", exact), ("compressed", compressed)):
            records[-1][f"{name}_validation"] = record["validation_loss"]
        return records


def test_warm_up_is_exact_and_then_layers_are_compressed(ranks: Ranks, corpus: Path) -> None:
    def records(**moe: Any) -> list[dict[str, Any]]:
        tree = tiny_tree(corpus, corpus.parent / "warmup", parallel=EP2 | PLAIN, moe=MOE | moe)
        return list(ranks.run(2, step_records, tree, 4, megatron=True)[0])

    exact = records()
    found = records(**LSH, moe_lsh_warmup_steps=2, moe_lsh_layers=[1, 3])
    losses = [[record["loss"] for record in run] for run in (found, exact)]
    # The third loss is computed compressed, with weights that were trained exactly.
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]
    assert "lsh_rate" not in exact[0]
    for step, record in enumerate(found):
        assert len(record["lsh_rate"]) == len(record["lsh_relative_error"]) == 2
        if step < 2:
            assert record["lsh_rate"] == [1.0, 1.0]
            assert record["lsh_bytes"] == 0
        else:
            assert all(0.0 < rate < 0.7 for rate in record["lsh_rate"])
            assert all(0.0 < error < 1.0 for error in record["lsh_relative_error"])
            assert 0 < record["lsh_bytes"] < record["lsh_exact_bytes"]
    # Held-out text takes the exact way, unless a study asks for the other one.
    assert found[-1]["exact_validation"] != found[-1]["compressed_validation"]
    assert exact[-1]["exact_validation"] == exact[-1]["compressed_validation"]


def test_who_has_the_experts_does_not_matter(ranks: Ranks, corpus: Path) -> None:
    """Buckets are of a rank's own tokens, so two ranks with all experts do the same."""
    reports = []
    in_chunks = {"moe_num_chunks": 3, "moe_num_backward_chunks": 2}
    for parallel, more in ((PLAIN, {}), (EP2 | PLAIN, {}), (EP2 | ZERO1, in_chunks)):
        moe = MOE | LSH | more
        tree = tiny_tree(corpus, corpus.parent / "spread", parallel=parallel, moe=moe)
        reports.append(ranks.run(2, train_and_report, tree, 3, megatron=True))
    for found in reports[1:]:
        for step in range(3):
            assert found[0]["losses"][step] == pytest.approx(
                reports[0][0]["losses"][step], abs=1e-5
            )
            wanted, grads = merged(reports[0], "grads", step), merged(found, "grads", step)
            difference = norm_of(grads[name] - grad for name, grad in wanted.items())
            assert difference <= 1e-4 * norm_of(wanted.values())


def test_resumes_bit_by_bit_across_the_warm_up(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    moe = MOE | LSH | {"moe_lsh_warmup_steps": 3, "moe_lsh_payload": "int8"}
    tree = tiny_tree(corpus, tmp_path / "run", parallel=EP2 | ZERO1, moe=moe)
    expected = ranks.run(2, train_save_train, tree, 2, 3, megatron=True)[0]
    assert ranks.run(2, resume_train, tree, 3, megatron=True)[0] == expected


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"moe_lsh_layers": [0]}, "moe_lsh_layers does nothing without moe.moe_lsh_num_hashes"),
        (LSH | {"moe_lsh_hash_dim": 65}, "moe_lsh_hash_dim=65 is more than model.hidden_size=64"),
        (LSH | {"moe_lsh_num_hashes": 40}, "40 hashes of 2 directions make"),
        (LSH | {"moe_lsh_payload_gradients": True}, "needs moe.moe_lsh_payload"),
        (
            LSH | {"moe_layer_freq": 2, "moe_lsh_layers": [0, 1]},
            r"layers without experts: \[1\]; there are \[0, 2\]",
        ),
        (
            LSH | {"moe_lsh_num_refinements": 1, "moe_lsh_centroid": "first"},
            "use moe.moe_lsh_centroid=mean",
        ),
        (LSH | {"moe_lsh_layers": []}, "compresses nothing"),
    ],
)
def test_rules(fields: dict[str, Any], text: str) -> None:
    config = tree_config(**{f"moe__{key}": value for key, value in (MOE | fields).items()})
    with pytest.raises(UserError, match=text):
        check_config(config, world_size=1)


def test_layers() -> None:
    moe = {f"moe__{key}": value for key, value in (MOE | LSH).items()}
    assert tree_config(**moe, moe__moe_layer_freq=2).lsh_layers == [0, 2]
    assert tree_config(**moe, moe__moe_lsh_layers=[3, 1]).lsh_layers == [1, 3]
    assert tree_config().lsh_layers == []
