"""Signals that a user or a batch system sends to the parent and means for the ranks."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextlib.contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Within the block, arriving signals wait in the list instead of ending this process."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
