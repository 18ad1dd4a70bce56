from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.split import PREFIX_BYTES, SplitRule, choose_rule, split_hash

HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=30)


def rule_of(hashes: list[int], fraction: float) -> SplitRule:
    half = len(hashes) // 2
    blocks = [np.array(part, np.uint64) for part in (hashes[:half], hashes[half:])]
    return choose_rule(blocks, fraction)


@given(HASHES, st.floats(0, 0.99))
def test_both_sides_have_documents_where_that_is_possible(
    hashes: list[int], fraction: float
) -> None:
    rule = rule_of(hashes, fraction)
    side = rule.is_validation(np.array(hashes, np.uint64)).tolist()
    if hashes:
        assert not all(side), "nothing to train on"
    if len(set(hashes)) > 1 and rule.threshold > 0:
        assert any(side), "nothing held out"
    if rule.threshold == 0:
        assert not any(side)
    by_hash: dict[int, bool] = {}
    for number, held_out in zip(hashes, side, strict=True):
        assert by_hash.setdefault(number, held_out) == held_out, "copies on both sides"


def test_the_rule_is_the_threshold_for_large_corpora() -> None:
    hashes = np.random.default_rng(1).integers(0, 2**64, 20_000, np.uint64)
    rule = choose_rule([hashes], 0.05)
    assert rule.note == ""
    assert abs(rule.is_validation(hashes).mean() - 0.05) < 0.01


def test_small_corpora_say_what_was_done() -> None:
    few = [2**63, 2**62, 2**63 + 5]
    rule = rule_of(few, 0.01)
    assert rule.is_validation(np.array(few, np.uint64)).tolist() == [False, True, False]
    assert "the one with the smallest hash is held out" in rule.note
    assert "single document" in rule_of([2**63], 0.01).note
    assert "single document" in rule_of([5, 5], 0.5).note
    assert "largest hash is trained on" in rule_of([5, 6], 0.5).note


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.integers(0, 3))
def test_the_beginning_decides(text: str, extra: int) -> None:
    long = (text + "x") * (PREFIX_BYTES // len((text + "x").encode()) + 1)
    assert split_hash(long) == split_hash(long + "more" * extra)
    assert split_hash(text) != split_hash(text + "y")
