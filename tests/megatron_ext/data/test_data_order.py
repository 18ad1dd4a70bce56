from __future__ import annotations

import json
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.order import Cursor, GlobalBatch, GlobalOrder
from megatron_ext.data.sequences import SequenceIndex
from megatron_ext.errors import UserError
from tests.megatron_ext.data.test_data_sequences import token_file

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def index_of(folder: Path, lengths: list[int], longest: int = 25) -> SequenceIndex:
    """A corpus of documents with so many predictions each."""
    folder.mkdir(exist_ok=True)
    return SequenceIndex(token_file(folder, [[1] * (length - 1) for length in lengths]), longest)


def drawn(batches: list[GlobalBatch]) -> list[tuple[int, int, int]]:
    return [
        row
        for batch in batches
        for row in zip(
            batch.corpora.tolist(), batch.sequences.tolist(), batch.lengths.tolist(), strict=True
        )
    ]


@settings(max_examples=40)
@given(st.lists(LENGTHS, min_size=1, max_size=3), st.data())
def test_a_resumed_order_is_the_order(
    tmp_path_factory: pytest.TempPathFactory, corpora: list[list[int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("x")
    indices = [index_of(folder / str(i), lengths) for i, lengths in enumerate(corpora)]
    weights = [data.draw(st.floats(0.01, 10)) for _ in corpora]
    budgets = data.draw(st.lists(st.integers(1, 5000), min_size=2, max_size=8))
    order = GlobalOrder(indices, weights, seed=5)
    batches, cursors = [], [order.cursor]
    for budget in budgets:
        batches.append(order.next_batch(budget))
        cursors.append(order.cursor)
    start = data.draw(st.integers(0, len(budgets) - 1))
    cursor = Cursor.from_dict(json.loads(json.dumps(cursors[start].to_dict())))
    assert cursor == cursors[start]
    resumed = GlobalOrder(indices, weights, seed=5)
    resumed.seek(cursor)
    again = [resumed.next_batch(budget) for budget in budgets[start:]]
    assert drawn(again) == drawn(batches[start:])
    assert [batch.step for batch in again] == list(range(start, len(budgets)))
    assert resumed.cursor == cursors[-1]


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 400))
def test_batches_are_full_but_not_over(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], budget: int
) -> None:
    order = GlobalOrder([index_of(tmp_path_factory.mktemp("x"), lengths)], seed=1)
    batches = [order.next_batch(budget) for _ in range(6)]
    for batch, following in pairwise(batches):
        assert len(batch.lengths) >= 1
        if len(batch.lengths) > 1:
            assert batch.num_tokens <= budget
        assert batch.num_tokens + int(following.lengths[0]) > budget


def test_batch_size_does_not_change_the_order(tmp_path: Path) -> None:
    indices = [index_of(tmp_path / str(i), list(range(1, 30 + i))) for i in range(2)]
    rows = []
    for budget in (50, 1000, 100_000):
        order = GlobalOrder(indices, [1, 3], seed=2)
        batches: list[GlobalBatch] = []
        while sum(batch.lengths.size for batch in batches) < 9000:
            batches.append(order.next_batch(budget))
        rows.append(drawn(batches)[:9000])
    assert rows[0] == rows[1] == rows[2]


def test_each_epoch_has_every_sequence_once_and_is_new(tmp_path: Path) -> None:
    index = index_of(tmp_path, list(range(1, 61)))
    order = GlobalOrder([index], seed=3)
    batches = [order.next_batch(10_000) for _ in range(20)]
    numbers = [row[1] for row in drawn(batches)]
    size = index.num_sequences
    epochs = [numbers[i * size : (i + 1) * size] for i in range(len(numbers) // size)]
    assert len(epochs) > 50
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    other = GlobalOrder([index], seed=4).next_batch(10_000)
    assert other.sequences.tolist() != batches[0].sequences.tolist()
    assert order.epochs[0] == pytest.approx(len(numbers) / size)


def test_corpora_are_blended_by_tokens(tmp_path: Path) -> None:
    """Next comes the corpus that lags most, compared with the plain loop of the definition."""
    indices = [
        index_of(tmp_path / str(i), lengths, longest=1000)
        for i, lengths in enumerate(([3] * 50, [500, 20], [40, 41, 42]))
    ]
    weights = [0.2, 0.7, 0.1]
    order = GlobalOrder(indices, weights, seed=8)
    rows = drawn([order.next_batch(3000) for _ in range(200)])
    streams = [[row for row in rows if row[0] == corpus] for corpus in range(3)]
    consumed = [0, 0, 0]
    used = [0, 0, 0]
    for row in rows:
        progress = [tokens / weight for tokens, weight in zip(consumed, weights, strict=True)]
        corpus = progress.index(min(progress))
        assert row == streams[corpus][used[corpus]]
        used[corpus] += 1
        consumed[corpus] += row[2]
    total = sum(consumed)
    for tokens, weight in zip(consumed, weights, strict=True):
        assert abs(tokens - weight * total) <= 2 * 500
    assert order.cursor.tokens == tuple(consumed)
    assert order.cursor.sequences == tuple(used)


def test_without_weights_all_corpora_are_seen_equally_often(tmp_path: Path) -> None:
    indices = [index_of(tmp_path / "a", [20] * 300), index_of(tmp_path / "b", [20] * 30)]
    order = GlobalOrder(indices, seed=1)
    for _ in range(10):
        order.next_batch(6600)
    assert order.epochs[0] == pytest.approx(10, abs=0.1)
    assert order.epochs[1] == pytest.approx(10, abs=0.1)


def test_a_cursor_of_another_order_is_refused(tmp_path: Path) -> None:
    index = index_of(tmp_path / "a", [20] * 30)
    longer = index_of(tmp_path / "a", [20] * 30, longest=10)
    cursor = GlobalOrder([index], [1], seed=1).cursor
    for order in (
        GlobalOrder([index], [1], seed=2),
        GlobalOrder([longer], [1], seed=1),
        GlobalOrder([index], [2], seed=1),
        GlobalOrder([index, index], [1, 1], seed=1),
    ):
        with pytest.raises(UserError, match="max_sequence_length or the seed were changed"):
            order.seek(cursor)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"step": 1, "sequences": [1], "tokens": [1, 2], "order": "x"},
        {"step": -1, "sequences": [1], "tokens": [1], "order": "x"},
        {"step": 1, "sequences": ["1"], "tokens": [1], "order": "x"},
        {"step": True, "sequences": 3, "tokens": [1], "order": "x"},
    ],
)
def test_what_is_no_cursor_is_refused(tree: dict[str, object]) -> None:
    with pytest.raises(UserError, match="not a data cursor"):
        Cursor.from_dict(tree)


def test_corpora_and_weights_must_fit(tmp_path: Path) -> None:
    index = index_of(tmp_path / "a", [20])
    empty = index_of(tmp_path / "b", [])
    for indices, weights, message in (
        ([], [], "0 corpora"),
        ([index], [1.0, 2.0], "1 corpora with 2 weights"),
        ([index], [0.0], "weight 0.0, expected a number above 0"),
        ([index], [float("nan")], "expected a number above 0"),
        ([index, empty], [1.0, 1.0], "has no documents"),
    ):
        with pytest.raises(UserError, match=message):
            GlobalOrder(indices, weights, seed=1)


def test_a_large_batch_is_quick(tmp_path: Path) -> None:
    """2,000 sequences in at most 5 ms; the median, as the machine may be busy."""
    draw = np.random.default_rng(1)
    indices = [
        index_of(tmp_path / str(i), draw.integers(2, 2000, 5000).tolist(), longest=1000)
        for i in range(2)
    ]
    order = GlobalOrder(indices, [0.7, 0.3], seed=1)
    average = sum(index.num_tokens for index in indices) / sum(i.num_sequences for i in indices)
    order.next_batch(int(2000 * average))
    seconds, counts = [], Counter[int]()
    for _ in range(30):
        started = time.perf_counter()
        batch = order.next_batch(int(2000 * average))
        seconds.append(time.perf_counter() - started)
        counts[len(batch.lengths) // 1000] += 1
    assert counts.most_common(1)[0][0] in (1, 2)
    assert np.median(seconds) <= 0.005
