"""The ranks of the test run themselves: that they compute together, and tell what went wrong."""

import os
import signal
import time

import pytest
import torch
from torch import distributed

from tests.rank_pool import RankError, Ranks


def _all_reduce(scale: float, *, offset: float = 0.0) -> tuple[int, float]:
    tensor = torch.tensor(distributed.get_rank() * scale + offset)
    distributed.all_reduce(tensor)
    return os.getpid(), tensor.item()


def _send_tensor() -> torch.Tensor:
    return torch.full((2, 3), float(distributed.get_rank()), dtype=torch.bfloat16)


def _raise_in(rank: int) -> None:
    if distributed.get_rank() == rank:
        raise LookupError("the reason in its own words")
    distributed.barrier()


def _hang_in(rank: int) -> None:
    if distributed.get_rank() == rank:
        _sleep_for_ever()
    distributed.barrier()


def _sleep_for_ever() -> None:
    time.sleep(3600)


def _die_in(rank: int) -> None:
    if distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def _leave_in(rank: int) -> None:
    if distributed.get_rank() == rank:
        os._exit(0)
    distributed.barrier()


def _make_a_mess() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.rand(7)


def _look_around() -> tuple[str | None, str, torch.dtype, bool, float]:
    return (
        os.environ.get("LEFT_BEHIND"),
        os.getcwd(),
        torch.get_default_dtype(),
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        torch.rand(1).item(),
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_add_up(ranks: Ranks, world_size: int) -> None:
    expected = sum(2.0 * rank + 1.0 for rank in range(world_size))
    results = ranks.run(world_size, _all_reduce, 2.0, offset=1.0)
    assert [total for _, total in results] == [expected] * world_size
    assert len({pid for pid, _ in results} | {os.getpid()}) == world_size + 1


def test_processes_are_kept_between_calls(ranks: Ranks) -> None:
    first = ranks.run(2, _all_reduce, 1.0)
    assert ranks.run(2, _all_reduce, 1.0) == first


def test_results_come_back_in_rank_order_and_whole(ranks: Ranks) -> None:
    for rank, tensor in enumerate(ranks.run(2, _send_tensor)):
        assert torch.equal(tensor, torch.full((2, 3), float(rank), dtype=torch.bfloat16))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_names_its_rank_and_place(ranks: Ranks, rank: int) -> None:
    with pytest.raises(RankError, match="the reason in its own words") as caught:
        ranks.run(2, _raise_in, rank)
    assert caught.value.rank == rank
    assert f"\nrank {rank} raised\n" in str(caught.value)
    assert "in _raise_in" in str(caught.value)
    assert ranks.run(2, _all_reduce, 1.0)[0][1] == 1.0


def test_a_hang_ends_with_the_stack_of_who_hangs(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 1 did not answer in time; its stack:") as caught:
        ranks.run(2, _hang_in, 1, timeout_seconds=1.0)
    assert "in _sleep_for_ever" in str(caught.value)
    assert ranks.run(2, _all_reduce, 1.0)[0][1] == 1.0


def test_a_killed_rank_is_named_at_once(ranks: Ranks) -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 was killed by SIGKILL") as caught:
        ranks.run(2, _die_in, 1)
    assert caught.value.rank == 1
    assert time.monotonic() - started < 30.0


def test_leaving_early_with_exit_code_0_is_a_failure(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 0 left with exit code 0") as caught:
        ranks.run(2, _leave_in, 0)
    assert caught.value.rank == 0


def test_a_call_leaves_nothing_behind(ranks: Ranks) -> None:
    before = ranks.run(1, _look_around)
    ranks.run(1, _make_a_mess)
    assert ranks.run(1, _look_around) == before
    assert before[0][:1] == (None,)


def test_functions_that_ranks_cannot_find_are_refused(ranks: Ranks) -> None:
    with pytest.raises(TypeError, match="top level"):
        ranks.run(1, lambda: None)
    with pytest.raises(ValueError, match="expected 1 to 8"):
        ranks.run(9, _send_tensor)
