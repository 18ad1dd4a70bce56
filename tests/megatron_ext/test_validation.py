"""Validation: whole documents, every byte once, the same figure on any layout; blended corpora."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data.corpus import Corpus
from megatron_ext.training_data import SequenceRef, TrainingData, validation_groups
from parallel.plan.records import StepPlan
from tests.megatron_ext.tiny_run import opened, tiny_config, tiny_tree
from tests.rank_pool import Ranks


def test_validation_takes_whole_documents_once(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_tree(corpus, tmp_path), world_size=1)
    opened_corpus = Corpus.open(corpus)
    data = TrainingData(config, [opened_corpus])
    refs, lengths, num_bytes = data.validation_documents(None, seed=0)
    held_out = opened_corpus.validation
    assert len(refs) == len(set(refs)) == data.validation[0].num_sequences
    # The tokenizer is one byte a token, and each document's end is one prediction more.
    assert sum(lengths) == num_bytes + held_out.num_documents
    assert num_bytes == int(held_out.document_bytes.sum())
    part, part_lengths, part_bytes = data.validation_documents(1000, seed=0)
    assert part == refs[: len(part)]
    assert 1000 <= sum(part_lengths) < sum(lengths)
    assert part_bytes < num_bytes
    # Other training seeds validate on the same documents.
    assert data.validation_documents(1000, seed=0)[0] == part


def test_groups_hold_everything_in_order() -> None:
    refs = [SequenceRef(0, i) for i in range(7)]
    lengths = [5, 5, 5, 20, 1, 1, 1]
    groups = list(validation_groups(refs, lengths, tokens_per_group=10))
    assert [ref for group, _ in groups for ref in group] == refs
    assert [sum(part) for _, part in groups] == [10, 5, 20, 3]


def validated(tree: dict[str, Any]) -> dict[str, Any]:
    from megatron_ext.validation import validate

    with opened(tree) as run:
        return dict(validate(run))


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2}),
        # Groups so small that a data-parallel rank of an interleaved pipeline has no sequence.
        (4, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    ],
    ids=["DP2", "TP2", "PP2", "VPP2xDP2"],
)
def test_bits_per_byte_does_not_depend_on_the_layout(
    ranks: Ranks, corpus: Path, tmp_path: Path, world_size: int, parallel: dict[str, Any]
) -> None:
    (expected,) = ranks.run(1, validated, tiny_tree(corpus, tmp_path), megatron=True)
    tree = tiny_tree(corpus, tmp_path, parallel=parallel)
    for found in ranks.run(world_size, validated, tree, megatron=True):
        assert found == pytest.approx(expected, abs=1e-5)
    # An untrained model knows nothing: about log2 of the padded vocabulary for each byte.
    assert expected["validation_bits_per_byte"] == pytest.approx(math.log2(384), rel=0.05)


def trained_and_validated(tree: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Twice the figures; whether a rank's first micro-batch meets another's later one."""
    from megatron_ext.trainer import train_step
    from megatron_ext.validation import validate

    with opened(tree) as run:
        train_step(run)
        first = dict(validate(run))
        steps = run.held_out.steps
        assert dict(validate(run)) == first
        assert run.held_out.steps is steps, "planned once"
    return first, any(_first_meets_later(plan) for plan, _ in steps)


def _first_meets_later(plan: StepPlan) -> bool:
    found: dict[int, set[int]] = {}
    for batches in plan.micro_batches:
        for index, batch in enumerate(batches):
            for piece in batch.pieces:
                found.setdefault(piece.sequence, set()).add(index)
    return any(0 in indices and len(indices) > 1 for indices in found.values())


def test_gathering_of_weights_does_not_wait_for_what_waits_for_it(
    ranks: Ranks, corpus: Path, tmp_path: Path
) -> None:
    """Gathered inside the first forward, weights would wait for a rank whose first forward waits
    for this one's second."""
    tree = tiny_tree(
        corpus,
        tmp_path / "run",
        data={"max_sequence_length": 1024, "tokens_per_rank": 512},
        train={"global_batch_tokens": 2048, "eval_tokens": 1000},
    )
    found = []
    for overlap in (True, False):
        parallel = {
            "planner": "hdp",
            "overlap_param_gather": overlap,
            "overlap_grad_reduce": overlap,
            "ddp_bucket_size": 4000 if overlap else None,
        }
        reports = ranks.run(
            3,
            trained_and_validated,
            tree | {"parallel": parallel},
            megatron=True,
            timeout_seconds=90.0,
        )
        assert all(is_crossed for _, is_crossed in reports), "the plans test nothing"
        found += [figures for figures, _ in reports]
    for figures in found[1:]:
        assert figures == pytest.approx(found[0], rel=1e-5)


def test_corpora_are_blended_by_tokens(corpus: Path, tmp_path: Path) -> None:
    entries = [{"path": str(corpus), "weight": 3.0}, {"path": str(corpus), "weight": 1.0}]
    tree = tiny_tree(corpus, tmp_path, data={"corpora": entries})
    config = tiny_config(tree, world_size=1)
    data = TrainingData(config, [Corpus.open(corpus), Corpus.open(corpus)])
    for _ in range(40):
        refs, lengths = data.next_step(1024)
        assert len(refs) == len(lengths)
    first, second = data.order.cursor.tokens
    assert first / (first + second) == pytest.approx(0.75, abs=0.01)
