"""Host memory for activations: pages that are kept and used again.

Pinning memory takes longer than filling it, so a page once made is never given up. Micro-batches
differ in length; so a run of bytes lies on as many whole pages as it fills, and its rest on one
page of the next power of two. That leaves few sizes, each used again by whoever comes next, and
wastes at most half a page a run. (torch's own cache of pinned memory would round the whole run up
to a power of two.)
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

from torch import Tensor

from parallel.offload.link import Link, Ticket

# A transfer of this size takes a millisecond, a call microseconds.
PAGE_BYTES = 32 << 20
_SMALLEST_PAGE_BYTES = 4 << 10


def page_sizes(num_bytes: int, *, page_bytes: int = PAGE_BYTES) -> Iterator[int]:
    """Sizes of the pages on which so many bytes lie, each a power of two."""
    num_whole, rest = divmod(num_bytes, page_bytes)
    yield from (page_bytes for _ in range(num_whole))
    if rest:
        yield max(_SMALLEST_PAGE_BYTES, 1 << (rest - 1).bit_length())


class HostPages:
    """The pages of one rank; `num_bytes` is what they take together."""

    def __init__(self, link: Link, *, page_bytes: int = PAGE_BYTES) -> None:
        self.num_bytes = 0
        self._link = link
        self._page_bytes = page_bytes
        # The page that was given back first is the likeliest to be no longer read.
        self._free: dict[int, deque[tuple[Tensor, Ticket]]] = defaultdict(deque)

    def take(self, num_bytes: int) -> tuple[list[Tensor], list[Ticket]]:
        """Pages for so many bytes, and the copies that must end before they are written.

        Raises MemoryError where the host has no more memory to pin.
        """
        pages, tickets = [], []
        for size in page_sizes(num_bytes, page_bytes=self._page_bytes):
            if self._free[size]:
                page, ticket = self._free[size].popleft()
                tickets.append(ticket)
            else:
                page = self._new(size)
            pages.append(page)
        return pages, tickets

    def give(self, pages: Sequence[Tensor], *, after: Ticket) -> None:
        """Hand pages back; the copies of `after` may still read them."""
        for page in pages:
            self._free[page.numel()].append((page, after))

    def _new(self, num_bytes: int) -> Tensor:
        try:
            page = self._link.host_bytes(num_bytes)
        except RuntimeError as error:
            raise MemoryError(
                f"no more host memory for offloaded activations: {self.num_bytes} bytes are held, "
                f"{num_bytes} more were refused ({error}); fewer ranks on this host or a smaller "
                "offload ratio would need less"
            ) from error
        self.num_bytes += num_bytes
        return page
