"""alpha + n beta from measured points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.schedule.linear_cost import LinearCost, fit_linear


@given(
    st.floats(0.0, 1e-2),
    st.floats(1e-10, 1e-3),
    st.lists(st.integers(1, 1 << 24), min_size=2, max_size=8, unique=True),
)
def test_points_on_a_line_give_the_line(alpha: float, beta: float, sizes: list[int]) -> None:
    line = LinearCost(alpha, beta)
    found = fit_linear(sizes, [line.seconds(size) for size in sizes])
    for size in sizes:
        assert found.seconds(size) == pytest.approx(line.seconds(size), rel=1e-5)


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(1e-6, 1.0)), min_size=1, max_size=6))
def test_the_fit_is_the_best_of_a_fine_grid(points: list[tuple[int, float]]) -> None:
    sizes, seconds = [size for size, _ in points], [taken for _, taken in points]

    def error(cost: LinearCost) -> float:
        return sum((cost.seconds(n) / taken - 1.0) ** 2 for n, taken in points)

    found = fit_linear(sizes, seconds)
    assert found.fixed_seconds >= 0
    assert found.seconds_per_unit >= 0
    steps = [0.0, *(2.0 ** (i / 2) for i in range(-6, 7))]
    for alpha in (step * min(seconds) for step in steps):
        for beta in (step * min(taken / n for n, taken in points) for step in steps):
            assert error(found) <= error(LinearCost(alpha, beta)) + 1e-6


def test_one_size_is_put_down_to_the_slope() -> None:
    assert fit_linear([4], [8.0]) == LinearCost(0.0, 2.0)


def test_a_time_that_falls_with_size_is_a_constant() -> None:
    found = fit_linear([1, 2, 4], [3.0, 2.0, 1.0])
    assert found.seconds_per_unit == 0.0
    assert 1.0 < found.fixed_seconds < 2.0


@pytest.mark.parametrize(("sizes", "seconds"), [([], []), ([1], []), ([1, 2], [1.0, 0.0])])
def test_what_cannot_be_fitted_is_refused(sizes: list[int], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        fit_linear(sizes, seconds)
