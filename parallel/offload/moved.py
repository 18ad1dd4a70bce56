"""Saved tensors as bytes of a storage, and storages of which a part leaves the device.

Several saved tensors may be views of one storage (queries, keys and values of one product; an
input that two operators keep). Their bytes leave once, as bytes: the run from the first byte that
any of them views to the last. When they come back every view is laid over the new run at its old
place, so values, strides and sharing are what they were.

The first part of the run goes to the host; the rest moves into a storage of its own, or the device
would free nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.offload.host_memory import HostPages
from parallel.offload.link import Link, Ticket

# Allocators of devices hand out multiples of this; a run that starts at one keeps the alignment of
# every view.
_ALIGNMENT_BYTES = 512


@dataclass(frozen=True, slots=True)
class View:
    """A strided tensor without its memory; `first_byte` counts from the start of its storage."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    first_byte: int

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        return cls(
            tensor.dtype,
            tensor.shape,
            tuple(int(step) for step in tensor.stride()),
            int(tensor.storage_offset()) * tensor.element_size(),
        )

    @property
    def end_byte(self) -> int:
        """Behind the last byte that it touches."""
        if 0 in self.shape:
            return self.first_byte
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.first_byte + (last + 1) * self.dtype.itemsize

    def over(self, run: Tensor, *, first_byte: int) -> Tensor:
        """This view on a run of bytes (uint8) whose first one was `first_byte` of the storage."""
        offset_bytes = run.storage_offset() + self.first_byte - first_byte
        empty = torch.empty(0, dtype=self.dtype, device=run.device)
        return empty.set_(
            run.untyped_storage(), offset_bytes // self.dtype.itemsize, self.shape, self.stride
        )


def changed_in_place(shape: list[int]) -> RuntimeError:
    """Autograd leaves this check to those who take tensors from it."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation, after it was saved: a tensor of shape {shape}"
    )


def run_of(views: Iterable[View]) -> tuple[int, int]:
    """First byte and end of the run that holds all views; at least one view."""
    views = list(views)
    first = min(view.first_byte for view in views)
    return first - first % _ALIGNMENT_BYTES, max(view.end_byte for view in views)


def run_bytes(storage: torch.UntypedStorage, first_byte: int, end_byte: int) -> Tensor:
    """Those bytes of a storage as a uint8 tensor that shares them."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, first_byte, (end_byte - first_byte,), (1,))


@dataclass(frozen=True, slots=True)
class Departure:
    """What is to leave.

    Attributes:
        tensor: a saved tensor of the storage; it tells of changes in place.
        run: bytes of the storage (uint8).
        first_byte: the run's place in the storage.
        num_leaving: so many bytes from the run's start leave.
    """

    tensor: Tensor
    run: Tensor
    first_byte: int
    num_leaving: int


class MovedStorage:
    """A run of bytes on its way to the host, there, or on its way back.

    Args:
        departure: what leaves; at least one byte.
    """

    def __init__(self, departure: Departure, *, link: Link, host: HostPages) -> None:
        source = departure.run
        self.first_byte = departure.first_byte
        self.num_leaving = num_leaving = departure.num_leaving
        self._witness: Tensor | None = departure.tensor
        self._version = departure.tensor._version
        self._is_spoilt = False
        self._size = source.numel()
        self._link, self._host = link, host
        self._source: Tensor | None = source
        self._kept: Tensor | None = torch.empty_like(source[num_leaving:])
        self._pages, self.pages_free = host.take(num_leaving)
        self._left: Ticket = None
        self._returned: Tensor | None = None
        self._under_way: Ticket | None = None

    def holds(self, first_byte: int, end_byte: int, *, version: int) -> bool:
        """Whether a run of the same storage lies within this one, and still is what it was."""
        is_within = self.first_byte <= first_byte and end_byte <= self.first_byte + self._size
        return is_within and version == self._version

    def copies_out(self) -> list[tuple[Tensor, Tensor]]:
        """The copies after which it has left; they start after the tickets `pages_free`."""
        assert self._source is not None
        assert self._kept is not None
        # Within the device first: that is quick.
        rest = [(self._kept, self._source[self.num_leaving :])] if self._kept.numel() else []
        return [*rest, *self._by_page(self._source)]

    def leaves(self, ticket: Ticket) -> None:
        """The copies out are under way."""
        self._left = ticket

    def release(self) -> None:
        """Free the run on the device once it has left; the compute stream waits for that."""
        self._look_for_changes()
        self._link.wait(self._left)
        self._source = self._witness = None
        if self._returned is not None:
            self._kept = None

    def come_back(self) -> int:
        """Start the way back unless it has begun; the number of bytes that the host sends."""
        if self._returned is not None:
            return 0
        if self._source is not None:
            # Wanted before it was gone.
            self._look_for_changes()
            self._returned = self._source
            self._host.give(self._pages, after=self._left)
            return 0
        assert self._kept is not None
        run = torch.empty(self._size, dtype=torch.uint8, device=self._kept.device)
        rest = [(run[self.num_leaving :], self._kept)] if self._kept.numel() else []
        from_host = [(part, page) for page, part in self._by_page(run)]
        # It has left: the compute stream waited for that, and the copies start behind it.
        self._under_way = self._link.copy_back([*rest, *from_host])
        self._returned = run
        self._host.give(self._pages, after=self._under_way)
        return self.num_leaving

    def arrive(self) -> None:
        """What the compute stream is given from here on finds the run back; `come_back` began."""
        if self._source is None and self._kept is not None:
            self._link.wait(self._under_way)
            self._kept = None

    def tensor(self, view: View) -> Tensor:
        """A view as it was saved, once `arrive` was called.

        Raises RuntimeError where it was changed in place while it was leaving.
        """
        assert self._returned is not None
        if self._is_spoilt:
            raise changed_in_place(list(view.shape))
        return view.over(self._returned, first_byte=self.first_byte)

    def _look_for_changes(self) -> None:
        assert self._witness is not None
        self._is_spoilt |= self._witness._version != self._version

    def _by_page(self, run: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(what is used of a host page, its part of the run) for the bytes that leave."""
        pairs, start = [], 0
        for page in self._pages:
            part = run[start : min(start + page.numel(), self.num_leaving)]
            pairs.append((page[: part.numel()], part))
            start += part.numel()
        return pairs
