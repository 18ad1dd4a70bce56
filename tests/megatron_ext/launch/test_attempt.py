"""Ranks agree on a name for their start, whatever earlier starts left in the store."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from megatron_ext.errors import UserError
from megatron_ext.launch.attempt import agree_on_attempt

WORLD_SIZE = 5


def _start_once(store: HashStore) -> list[str]:
    def join(rank: int) -> str:
        return agree_on_attempt(store, rank=rank, world_size=WORLD_SIZE, timeout_seconds=10.0)

    with ThreadPoolExecutor(WORLD_SIZE) as pool:
        # Rank 0 last: the others already wait, as they may.
        return list(pool.map(join, reversed(range(WORLD_SIZE))))


def test_all_agree_and_no_two_starts_do() -> None:
    store = HashStore()
    attempts = [_start_once(store) for _ in range(4)]
    assert all(len(set(attempt)) == 1 for attempt in attempts)
    assert len({attempt[0] for attempt in attempts}) == 4


def test_what_dead_ranks_left_is_not_believed() -> None:
    store = HashStore()
    store.set("hello/1", "word-of-the-dead")
    store.set("answer/word-of-the-dead", "an-old-attempt")
    store.set("thanks/an-old-attempt/1", "1")
    attempt = set(_start_once(store))
    assert len(attempt) == 1
    assert attempt != {"an-old-attempt"}


def test_missing_ranks_are_named() -> None:
    store = HashStore()
    with pytest.raises(UserError, match=r"2 of 2 other ranks did not start in time \(rank 1, 2\)"):
        agree_on_attempt(store, rank=0, world_size=3, timeout_seconds=0.1)
    with pytest.raises(UserError, match="rank 1: rank 0 did not answer"):
        agree_on_attempt(store, rank=1, world_size=3, timeout_seconds=0.1)
