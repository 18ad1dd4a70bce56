"""What all planners refuse: numbers below 1, empty sequences, and costs that are no costs."""

import math
from collections.abc import Sequence

from parallel.errors import PlanError


def check_numbers(**numbers: int) -> None:
    """Raise PlanError for one below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise PlanError(f"{name} is {value}; it must be at least 1")


def check_not_empty(lengths: Sequence[int]) -> None:
    """Raise PlanError for a sequence of no tokens."""
    if lengths and min(lengths) < 1:
        index = next(index for index, length in enumerate(lengths) if length < 1)
        raise PlanError(f"sequence {index} has {lengths[index]} tokens; drop empty sequences first")


def check_constants(**constants: float) -> None:
    """Raise PlanError for one that is negative, infinite or no number."""
    for name, value in constants.items():
        if not 0.0 <= value < math.inf:
            raise PlanError(f"{name} is {value}; it must be finite and at least 0")


def check_positive(**constants: float) -> None:
    """Raise PlanError for one that is 0 as well."""
    check_constants(**constants)
    for name, value in constants.items():
        if not value:
            raise PlanError(f"{name} is {value}; it must be above 0")
