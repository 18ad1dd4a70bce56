"""What is on its way between the device and the host on one rank, and how much there was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from parallel.offload.host_memory import PAGE_BYTES, HostPages
from parallel.offload.link import Link, open_link
from parallel.offload.moved import Departure, MovedStorage


@dataclass(frozen=True, slots=True)
class OffloadCount:
    """What moved in a step, and the host memory that is held for it."""

    offloaded_bytes: int
    returned_bytes: int
    """Less than offloaded where something was wanted before it was gone."""
    host_bytes: int


class Shuttle:
    """The way out and the way back of all micro-batches of a rank.

    What a copy reads or writes on the device lives until the compute stream has waited for the
    copy, whatever becomes of the tensors: this object holds it.
    """

    def __init__(
        self, device: torch.device, *, link: Link | None = None, page_bytes: int = PAGE_BYTES
    ) -> None:
        # As tensors name it: with its index.
        self.device = torch.empty(0, device=device).device
        self._link = link or open_link(self.device)
        self._host = HostPages(self._link, page_bytes=page_bytes)
        self._leaving: list[MovedStorage] = []
        self._coming: dict[int, MovedStorage] = {}
        self._offloaded_bytes = 0
        self._returned_bytes = 0

    def send(self, departures: Iterable[Departure]) -> list[MovedStorage]:
        """Start the way out; `release` was called."""
        assert not self._leaving
        moved = [
            MovedStorage(departure, link=self._link, host=self._host) for departure in departures
        ]
        if not moved:
            return []
        copies = [copy for storage in moved for copy in storage.copies_out()]
        before = [ticket for storage in moved for ticket in storage.pages_free]
        ticket = self._link.copy_out(copies, after=before)
        for storage in moved:
            storage.leaves(ticket)
            self._offloaded_bytes += storage.num_leaving
        self._leaving = moved
        return moved

    def release(self) -> None:
        """Free on the device what is on its way out; the compute stream waits until it is gone."""
        for storage in self._leaving:
            storage.release()
        self._leaving = []

    def bring_back(self, storages: Iterable[MovedStorage]) -> None:
        """Start the way back where it has not begun."""
        for storage in storages:
            num_bytes = storage.come_back()
            if num_bytes:
                self._returned_bytes += num_bytes
                self._coming[id(storage)] = storage

    def arrive(self, storage: MovedStorage) -> None:
        """What the compute stream is given from here on finds the storage back."""
        self.bring_back([storage])
        storage.arrive()
        self._coming.pop(id(storage), None)

    def end_step(self) -> OffloadCount:
        """Wait (on the compute stream) for all that is under way, and count anew."""
        self.release()
        for storage in list(self._coming.values()):
            self.arrive(storage)
        count = OffloadCount(self._offloaded_bytes, self._returned_bytes, self._host.num_bytes)
        self._offloaded_bytes = self._returned_bytes = 0
        return count
