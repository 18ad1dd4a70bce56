"""Signals that wait in a list until somebody looks, in place of ending the process."""

import contextlib
import signal
from collections.abc import Iterable, Iterator
from types import FrameType


@contextlib.contextmanager
def noted_signals(numbers: Iterable[signal.Signals]) -> Iterator[list[int]]:
    """Within the block, arriving signals of these numbers are appended to the list.

    To be called from the main thread; Python lets no other one change handlers.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
