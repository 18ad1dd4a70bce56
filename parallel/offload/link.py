"""The link between a device and its host: copies that run beside the computation.

Each direction has a stream of its own, so that both directions of the bus carry data at once and
no copy takes a turn of the compute stream:

    compute  | forward l   | forward l+1 | ...  backward l+1  | backward l   |
    out      |             | l leaves    | ...                |              |
    back     |             |             | ...  l comes back  |              |

A copy starts after everything that the compute stream has been given so far; a copy out also after
those copies whose tickets it names, which may still read what it writes. The compute stream waits
for a ticket only where it needs what came. The host never waits. On a CPU there is one memory and
one order: a copy is done at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Ticket = object
"""Stands for copies under way; only the link that gave it can read it."""
Copies = Sequence[tuple[Tensor, Tensor]]
"""(destination, source), contiguous and of one size and dtype."""


class Link(Protocol):
    """Whoever calls keeps both sides of a copy alive until it has waited for the ticket."""

    def copy_out(self, copies: Copies, *, after: Iterable[Ticket] = ()) -> Ticket:
        """Copy from the device, in the order of all calls."""
        ...

    def copy_back(self, copies: Copies) -> Ticket:
        """Copy to the device, in the order of all calls."""
        ...

    def wait(self, ticket: Ticket) -> None:
        """What the compute stream is given from here on starts after the ticket's copies."""
        ...

    def host_bytes(self, num_bytes: int) -> Tensor:
        """New host memory that the device can reach: uint8 [num_bytes]."""
        ...


class InlineLink:
    """One memory: copies are done when the call returns."""

    def copy_out(self, copies: Copies, *, after: Iterable[Ticket] = ()) -> Ticket:
        for destination, source in copies:
            destination.copy_(source)
        return None

    def copy_back(self, copies: Copies) -> Ticket:
        return self.copy_out(copies)

    def wait(self, ticket: Ticket) -> None: ...

    def host_bytes(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")


class StreamLink:
    """A CUDA or ROCm device and pinned host memory; tickets are events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._back = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy_out(self, copies: Copies, *, after: Iterable[Ticket] = ()) -> Ticket:
        return self._copy(self._out, copies, after)

    def copy_back(self, copies: Copies) -> Ticket:
        return self._copy(self._back, copies, after=())

    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(ticket)

    def host_bytes(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def _copy(
        self, stream: torch.cuda.Stream, copies: Copies, after: Iterable[Ticket]
    ) -> torch.cuda.Event:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        for ticket in after:
            assert isinstance(ticket, torch.cuda.Event)
            stream.wait_event(ticket)
        with torch.cuda.stream(stream):
            for destination, source in copies:
                destination.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event


def open_link(device: torch.device) -> Link:
    """The link of a device that holds activations."""
    return StreamLink(device) if device.type == "cuda" else InlineLink()
