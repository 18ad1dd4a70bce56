"""A link whose copies happen as late as they may: what does not wait for them reads garbage.

A stream is free to start a copy long after it was asked for; the only promise is that it is done
where its ticket was waited for. Here nothing is copied before that, sources are read then and not
earlier, and the copies' memory is held by nobody: so each missing wait, and each buffer that is
given up or written too early, changes the bits that come back or ends in an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.offload.link import Copies, Ticket

GARBAGE = 0xFF


@dataclass
class Job:
    """Copies of one call. Memory is held weakly: to keep it is the caller's duty."""

    copies: list[tuple[Memory, Memory]]
    after: list[Job]
    before: Job | None
    is_done: bool = False

    def run(self) -> None:
        if self.is_done:
            return
        if self.before is not None:
            self.before.run()
        for job in self.after:
            job.run()
        for destination, source in self.copies:
            destination.bytes().copy_(source.bytes())
        self.is_done = True


class Memory:
    """A uint8 tensor by its storage, weakly."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._offset, self._size = int(tensor.storage_offset()), tensor.numel()

    def bytes(self) -> Tensor:
        storage = self._storage()
        assert storage is not None, "memory was given up while a copy was under way"
        empty = torch.empty(0, dtype=torch.uint8)
        return empty.set_(storage, self._offset, (self._size,), (1,))


@dataclass
class LateLink:
    """Two streams of late copies; counts what was copied."""

    last: dict[str, Job | None] = field(default_factory=lambda: {"out": None, "back": None})
    jobs: list[Job] = field(default_factory=list)

    def copy_out(self, copies: Copies, *, after: Iterable[Ticket] = ()) -> Ticket:
        return self._add("out", copies, after)

    def copy_back(self, copies: Copies) -> Ticket:
        return self._add("back", copies, ())

    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, Job)
        ticket.run()

    def host_bytes(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), GARBAGE, dtype=torch.uint8)

    @property
    def num_under_way(self) -> int:
        return sum(not job.is_done for job in self.jobs)

    def _add(self, stream: str, copies: Copies, after: Iterable[Ticket]) -> Job:
        for destination, source in copies:
            assert destination.is_contiguous()
            assert source.is_contiguous()
            assert destination.shape == source.shape
            assert destination.dtype == source.dtype == torch.uint8
            if stream == "back":
                destination.fill_(GARBAGE)
        tickets = list(after)
        assert all(isinstance(ticket, Job) for ticket in tickets)
        job = Job(
            [(Memory(destination), Memory(source)) for destination, source in copies],
            [ticket for ticket in tickets if isinstance(ticket, Job)],
            self.last[stream],
        )
        self.last[stream] = job
        self.jobs.append(job)
        return job
