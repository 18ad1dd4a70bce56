"""What an operation costs by its size: a constant and a slope, from a few measured points.

    t(n) = alpha + n beta

alpha is what starting it costs (a launch, a handshake with each rank), beta what each byte or row
costs. Cut into r chunks it costs r alpha + n beta in all: overlap is bought with alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of an operation of size n (FSMoE, 2501.10714, section 4)."""

    fixed_seconds: float
    """alpha."""
    seconds_per_unit: float
    """beta."""

    def seconds(self, size: float) -> float:
        """alpha + n beta; an operation of size 0 is still started."""
        return self.fixed_seconds + size * self.seconds_per_unit

    def times(self, factor: float) -> LinearCost:
        """As many operations of this kind: alpha and beta both that often (backward, section 4)."""
        return LinearCost(factor * self.fixed_seconds, factor * self.seconds_per_unit)


def fit_linear(sizes: Sequence[float], seconds: Sequence[float]) -> LinearCost:
    """The non-negative alpha and beta with the least sum of squared relative errors.

    Relative, because small sizes tell alpha and would not count beside large ones.

    Args:
        sizes: at least one; with one, all of it is put down to the slope.
        seconds: what each took, more than 0.

    Raises:
        ValueError: no points, or a time that is not positive.
    """
    if not sizes or len(sizes) != len(seconds):
        raise ValueError(f"{len(sizes)} sizes and {len(seconds)} times: expected as many, not none")
    if min(seconds) <= 0:
        raise ValueError(f"a time of {min(seconds)} s: expected more than 0")
    taken = np.asarray(seconds, dtype=np.float64)
    terms = np.stack([np.ones_like(taken), np.asarray(sizes, dtype=np.float64)], axis=1)
    terms /= taken[:, None]
    if len(set(sizes)) > 1:
        (fixed, slope), *_ = np.linalg.lstsq(terms, np.ones_like(taken), rcond=None)
        if fixed >= 0 and slope >= 0:
            return LinearCost(float(fixed), float(slope))
    # The optimum lies on a border: one of the two alone.
    alone = [_alone(terms[:, 0]), _alone(terms[:, 1])]
    if max(sizes) > 0 and (len(set(sizes)) == 1 or alone[1][1] <= alone[0][1]):
        return LinearCost(0.0, alone[1][0])
    return LinearCost(alone[0][0], 0.0)


def _alone(term: np.ndarray) -> tuple[float, float]:
    """The factor of one term alone, and the squared error that is left."""
    factor = float(term.sum() / max(float(term @ term), 1e-300))
    return factor, float(np.square(factor * term - 1.0).sum())
