"""A small exchange of each kind that training uses: is the result right, and how fast was it?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.errors import UserError

_NUM_TRIALS = 3
# Ranks send small whole numbers that repeat: float32 adds those exactly, in any order, up to 2^24,
# which the numbers 1 to 5793 exceed.
_NUM_VALUES = 251


@dataclass(frozen=True, slots=True)
class LinkSpeeds:
    """Bytes a second that one rank sent (and received); medians."""

    all_reduce: float
    all_to_all: float
    ring: float


def try_links(device: torch.device, *, num_bytes: int, timeout_seconds: float) -> LinkSpeeds:
    """All-reduce, all-to-all and a ring among all ranks.

    Raises:
        UserError: one did not end in time, or its result is wrong; names the rank.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    count = max(1, num_bytes // 4 // size) * size
    own = torch.full((count,), value_of(rank), device=device)

    def all_reduce() -> Tensor:
        total = own.clone()
        _finish(dist.all_reduce(total, async_op=True), "all-reduce", timeout_seconds)
        return total

    def all_to_all() -> Tensor:
        received = torch.empty_like(own)
        work = dist.all_to_all_single(received, own, async_op=True)
        _finish(work, "all-to-all", timeout_seconds)
        return received

    def ring() -> Tensor:
        received = torch.empty_like(own)
        # Receives first: gloo may block a send that nobody waits for.
        operations = [
            dist.P2POp(dist.irecv, received, (rank - 1) % size),
            dist.P2POp(dist.isend, own, (rank + 1) % size),
        ]
        for work in dist.batch_isend_irecv(operations):
            _finish(work, "ring", timeout_seconds)
        return received

    of_each = torch.tensor([value_of(each) for each in range(size)], device=device)
    expected = {
        "all-reduce": torch.full_like(own, float(of_each.double().sum())),
        "all-to-all": of_each.repeat_interleave(count // size),
        "ring": torch.full_like(own, value_of((rank - 1) % size)),
    }
    seconds = {}
    for name, exchange in (("all-reduce", all_reduce), ("all-to-all", all_to_all), ("ring", ring)):
        seconds[name] = _median_seconds(name, exchange, expected[name], device)
    # Of a ring all-reduce each rank sends its tensor almost twice; of an all-to-all all but a part.
    sent = 4.0 * count
    share = (size - 1) / size
    return LinkSpeeds(
        all_reduce=2 * share * sent / seconds["all-reduce"],
        all_to_all=share * sent / seconds["all-to-all"],
        ring=sent / seconds["ring"],
    )


def value_of(rank: int) -> float:
    """What this rank sends; neighbours differ, and sums are exact for up to 130,000 ranks."""
    return float(rank % _NUM_VALUES + 1)


def _median_seconds(
    name: str, exchange: Callable[[], Tensor], expected: Tensor, device: torch.device
) -> float:
    seconds = []
    for _ in range(_NUM_TRIALS + 1):
        dist.barrier()
        began = time.perf_counter()
        result = exchange()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        if not torch.equal(result, expected):
            wrong = int((result != expected).sum())
            raise UserError(
                f"preflight: rank {dist.get_rank()}: {wrong:,} of {result.numel():,} values of the "
                f"{name} are wrong; the device or the network does not carry data faithfully"
            )
    # The first one opens connections.
    return statistics.median(seconds[1:])


def _finish(work: dist.Work | None, name: str, timeout_seconds: float) -> None:
    assert work is not None
    try:
        work.wait(timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        raise UserError(
            f"preflight: rank {dist.get_rank()}: the {name} of all ranks did not end within "
            f"{timeout_seconds:.0f} s ({str(error).splitlines()[0]})"
        ) from None
