"""What compression did since somebody last asked: rows, bytes and how far centroids are off.

    rate  = rows sent / rows of all choices
    error = sqrt(sum |x - c|^2 / sum |x|^2)      c: what the experts got in place of x

How many rows were sent is known on the host, because all-to-all must know; the other sums stay on
the device until they are read, so that a layer never waits for them.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """Sums over trips; reports of layers and ranks add up.

    Attributes:
        num_rows: choices that led to an expert.
        num_sent: rows that stood for them on the way to the experts.
        num_bytes: bytes between ranks (or nodes) for this rank's tokens, forward: rows there and
            answers back. Backward the gradients of both travel once more.
        num_exact_bytes: rows there and answers back if nothing were rounded and each token sent
            once to each rank that it needs, the least that is exact.
        squared_error, squared_size: sum |x - c|^2 and sum |x|^2.
    """

    num_rows: int = 0
    num_sent: int = 0
    num_bytes: int = 0
    num_exact_bytes: int = 0
    squared_error: float = 0.0
    squared_size: float = 0.0

    @property
    def rate(self) -> float:
        return self.num_sent / self.num_rows if self.num_rows else 1.0

    @property
    def relative_error(self) -> float:
        return (self.squared_error / self.squared_size) ** 0.5 if self.squared_size else 0.0

    def to_tensor(self) -> Tensor:
        """float64 [6], so that ranks can add up."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, sums: Tensor) -> CompressionReport:
        num_rows, num_sent, num_bytes, num_exact_bytes, error, size = sums.tolist()
        return cls(
            num_rows=round(num_rows),
            num_sent=round(num_sent),
            num_bytes=round(num_bytes),
            num_exact_bytes=round(num_exact_bytes),
            squared_error=error,
            squared_size=size,
        )


@dataclass(frozen=True, slots=True)
class TripCount:
    """One trip.

    Attributes:
        device_sums: float64 [4], squared error, squared size, bytes and those of an exact trip.
    """

    num_rows: int
    num_sent: int
    device_sums: Tensor

    def report(self) -> CompressionReport:
        error, size, num_bytes, exact_bytes = self.device_sums.tolist()
        return CompressionReport(
            self.num_rows, self.num_sent, round(num_bytes), round(exact_bytes), error, size
        )


class CompressionCounters:
    """The trips of one layer."""

    def __init__(self) -> None:
        self._sum: TripCount | None = None

    def add(self, trip: TripCount) -> None:
        old = self._sum
        if old is not None:
            trip = TripCount(
                num_rows=old.num_rows + trip.num_rows,
                num_sent=old.num_sent + trip.num_sent,
                device_sums=old.device_sums + trip.device_sums,
            )
        self._sum = trip

    def take(self) -> CompressionReport:
        """The sums so far, which begin again at 0; waits for the device."""
        report = CompressionReport() if self._sum is None else self._sum.report()
        self._sum = None
        return report


def squared_sums(difference: Tensor, rows: Tensor) -> Tensor:
    """float64 [2]: sums of squares of x - c and of x."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(part, dtype=wide) for part in (difference, rows)]
    return torch.stack(norms).double().square()
