"""Steps prepared ahead: the same steps, and a place in the data that knows only what was taken."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.data.workplace import METADATA_FILE
from megatron_ext.errors import UserError
from tests.megatron_ext.tiny_run import opened, tiny_tree
from tests.rank_pool import RankError, Ranks


def steps_and_places(tree: dict[str, Any], num_steps: int) -> list[tuple[Any, ...]]:
    found = []
    with opened(tree) as run:
        start = run.loader.cursor
        for _ in range(num_steps):
            step = run.loader.take()
            assert run.loader.cursor == step.cursor
            assert run.state().cursor == step.cursor.to_dict()
            tokens = [batch.tokens.tolist() for batch in step.batches]
            found.append((step.digest, step.cursor.to_dict(), tokens))
    with opened(tree) as run:
        # From the place behind the first step comes the second.
        run.loader.seek(type(start).from_dict(found[0][1]))
        assert run.loader.take(is_last=True).digest == found[1][0]
    return found


def test_prefetching_changes_nothing(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    found = [
        ranks.run(
            2,
            steps_and_places,
            tiny_tree(corpus, tmp_path / "run", data={"prefetch": prefetch}),
            4,
            megatron=True,
        )
        for prefetch in (True, False)
    ]
    assert found[0] == found[1]
    (first, second) = found[0]
    assert [step[0] for step in first] == [step[0] for step in second], "one plan for all ranks"
    assert [step[2] for step in first] != [step[2] for step in second], "each reads its own part"


def digests(tree: dict[str, Any]) -> tuple[str, str]:
    with opened(tree) as run:
        step = run.loader.take(is_last=True)
        return step.plan.digest(), step.digest


def test_another_corpus_is_noticed_where_its_lengths_are_the_same(
    ranks: Ranks, corpus: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(corpus, tmp_path / "other"))
    metadata = json.loads((other / METADATA_FILE).read_text())
    (other / METADATA_FILE).write_text(json.dumps(metadata | {"fingerprint": "ab" * 16}))
    ((plan, digest),) = ranks.run(1, digests, tiny_tree(corpus, tmp_path / "run"), megatron=True)
    ((same_plan, other_digest),) = ranks.run(
        1, digests, tiny_tree(other, tmp_path / "run"), megatron=True
    )
    assert plan == same_plan
    assert digest != other_digest


def kept_on_device(tree: dict[str, Any]) -> list[list[bool]]:
    """Which micro-batches are alive when one chunk took all, then as the second takes each."""
    from megatron_ext.step import iterators_of_chunks

    with opened(tree) as run:
        batches = run.loader.take(is_last=True).batches[:1] * 3
        first, second = iterators_of_chunks(batches, run.reader, num_chunks=2)
        tokens = [weakref.ref(next(first).tokens) for _ in batches]
        alive = [[token() is not None for token in tokens]]
        for token in tokens:
            taken = next(second)
            assert taken.tokens is token(), "the chunks share them"
            del taken
            alive.append([token() is not None for token in tokens])
    return alive


def test_micro_batches_leave_the_device_when_all_chunks_have_taken_them(
    ranks: Ranks, corpus: Path, tmp_path: Path
) -> None:
    (alive,) = ranks.run(1, kept_on_device, tiny_tree(corpus, tmp_path / "run"), megatron=True)
    assert alive == [
        [True, True, True],
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]


def disagree(odd_rank: int) -> None:
    from megatron_ext.plan_agreement import agree_on_plan

    device = torch.device("cpu")
    agree_on_plan("ab" * 32, device=device)
    agree_on_plan(("ab" if dist.get_rank() != odd_rank else "ac") * 32, device=device)


def test_a_rank_with_another_plan_is_named_on_every_rank(ranks: Ranks) -> None:
    with pytest.raises(RankError) as error:
        ranks.run(3, disagree, 1)
    assert "ranks 1 planned this step differently" in str(error.value)
    assert UserError.__name__ in str(error.value)
