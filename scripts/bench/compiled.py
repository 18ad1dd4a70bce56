"""One kernel or file that was compiled for one target, and whether it is what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Compiled:
    """What is printed and written for one kernel and target.

    Attributes:
        kernel: file and function, dotted; of CUDA the file's path.
        found, missing: expected instructions that are in the machine code, and those that are not.
        forbidden: instructions that must not be in it and are.
        num_registers, shared_bytes, spilled_bytes: of a thread, a block and a thread; of CUDA files
            the largest of their kernels. Spilled is what a thread keeps in memory.
        error: of the compiler; "" where it compiled.
    """

    kernel: str
    target: str
    found: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    num_registers: int = 0
    shared_bytes: int = 0
    spilled_bytes: int = 0
    seconds: float = 0.0
    error: str = ""

    def problem(self) -> str:
        """Why it fails; "" where it does not."""
        if self.error:
            return f"does not compile: {self.error}"
        parts = [f"has no {', '.join(self.missing)}"] if self.missing else []
        if self.forbidden:
            parts.append(f"has {', '.join(self.forbidden)}")
        return " and ".join(parts)


def found_and_missing(
    expected: Iterable[str], texts: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which of the strings stand in any of the texts, and which in none."""
    expected = tuple(expected)
    found = tuple(string for string in expected if any(string in text for text in texts))
    return found, tuple(string for string in expected if string not in found)
