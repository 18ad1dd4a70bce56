"""Pages: their sizes, that they are used again, and what is told when memory runs out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parallel.offload.host_memory import HostPages, page_sizes
from parallel.offload.link import InlineLink

PAGE = 1 << 14


@given(num_bytes=st.integers(0, 5 * PAGE))
def test_pages_hold_the_bytes_and_waste_little(num_bytes: int) -> None:
    sizes = list(page_sizes(num_bytes, page_bytes=PAGE))
    assert sum(sizes) >= num_bytes
    assert all(size <= PAGE and size & (size - 1) == 0 for size in sizes)
    assert sum(sizes) - num_bytes < max(PAGE // 2, 4096)


def test_the_page_given_first_is_taken_first() -> None:
    pages = HostPages(InlineLink(), page_bytes=PAGE)
    first, tickets = pages.take(PAGE)
    second, _ = pages.take(PAGE)
    assert tickets == []
    pages.give(first, after="read 1")
    pages.give(second, after="read 2")
    again, tickets = pages.take(2 * PAGE)
    assert [page.data_ptr() for page in again] == [page.data_ptr() for page in (*first, *second)]
    assert tickets == ["read 1", "read 2"]
    assert pages.num_bytes == 2 * PAGE


class SmallHost(InlineLink):
    def host_bytes(self, num_bytes: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")


def test_a_full_host_says_what_is_held() -> None:
    pages = HostPages(SmallHost(), page_bytes=PAGE)
    with pytest.raises(MemoryError, match="0 bytes are held, 4096 more were refused"):
        pages.take(100)
