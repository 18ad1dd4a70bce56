"""How much each knob matters: exact Shapley values over the whole grid of a search.

The Frontier paper (arXiv 2312.12705, section IV) fitted a surrogate to sampled runs and asked SHAP.
Here every point of the grid is known, so for a knob i, with v(S) the mean speed when the knobs in S
are held and the others drawn evenly,

    phi_i(x) = sum over S without i of |S|! (n - |S| - 1)! / n!  (v(S + i) - v(S))

needs no surrogate. The mean of |phi_i| over the grid says how far a knob moves the speed; what
cannot run counts as 0, as it did there.
"""

from __future__ import annotations

import itertools
from math import factorial

import numpy as np
import numpy.typing as npt

from megatron_ext.planning.search import Knob, SearchResult


def shapley_values(grid: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """phi of each axis at each point of the grid; together they add up to it less its mean."""
    n = grid.ndim
    means = {
        held: grid.mean(axis=tuple(axis for axis in range(n) if axis not in held), keepdims=True)
        for size in range(n + 1)
        for held in itertools.combinations(range(n), size)
    }
    values = []
    for axis in range(n):
        phi = np.zeros_like(grid)
        for held, mean in means.items():
            if axis not in held:
                weight = factorial(len(held)) * factorial(n - len(held) - 1) / factorial(n)
                phi += weight * (means[tuple(sorted((*held, axis)))] - mean)
        values.append(phi)
    return values


def knob_effects(result: SearchResult) -> dict[Knob, float]:
    """Mean |phi| of each knob, TFLOP/s of a device; knobs with a choice, the strongest first."""
    shape = tuple(len(values) for values in result.knobs.values())
    grid = np.array([outcome.tflops for outcome in result.outcomes]).reshape(shape)
    effects = {
        knob: float(np.abs(phi).mean())
        for knob, phi in zip(result.knobs, shapley_values(grid), strict=True)
        if len(result.knobs[knob]) > 1
    }
    return dict(sorted(effects.items(), key=lambda item: -item[1]))
