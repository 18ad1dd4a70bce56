"""The scaling benchmark: its arithmetic, what it adds to a file, and one real run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from scripts.bench.scaling_report import (
    Point,
    from_json,
    merge,
    num_units,
    plot,
    rows,
    table,
    to_json,
)

ROOT = Path(__file__).resolve().parents[3]
POINT = Point(
    mode="weak",
    num_ranks=1,
    num_units=1,
    tokens_per_step=1000,
    step_seconds=0.5,
    model_flops_per_second=4e10,
    peak_flops_per_rank=1e11,
    peak_memory_bytes=2**28,
    predicted_tokens_per_second=1900.0,
    device="CPU",
    measured_on="2026-11-24",
)


def points() -> list[Point]:
    two = replace(POINT, num_ranks=2, num_units=2, tokens_per_step=2000, step_seconds=0.625)
    four = replace(POINT, num_ranks=4, num_units=2, tokens_per_step=4000, step_seconds=1.25)
    return [four, POINT, replace(two, model_flops_per_second=6.4e10)]


def test_efficiency_is_of_the_units_that_compute() -> None:
    one, two, four = rows(points(), "weak")
    assert (one.efficiency, one.per_rank_efficiency) == (1.0, 1.0)
    assert two.efficiency == pytest.approx(0.8)
    # Four ranks on two cores: as fast as two, so 0.8 of a core and 0.4 of a rank.
    assert (four.efficiency, four.per_rank_efficiency) == pytest.approx((0.8, 0.4))
    assert (one.mfu, two.mfu) == pytest.approx((0.4, 0.32))
    assert rows(points(), "strong") == []


def test_units() -> None:
    assert num_units(8, num_cores=2) == 2
    assert num_units(1, num_cores=2) == 1
    assert num_units(8, num_cores=None) == 8


def test_points_are_kept_and_replaced() -> None:
    assert from_json(to_json(points())) == sorted(points(), key=lambda point: point.num_ranks)
    again = replace(POINT, step_seconds=1.0)
    merged = merge(points(), [again])
    assert len(merged) == 3
    assert again in merged
    assert POINT not in merged


def test_it_is_drawn_and_told(tmp_path: Path) -> None:
    text = table(points())
    assert "| weak | 2 | 2 | 2,000 | 3,200 | 1,900 | 80.0% | 80.0% | 32.0% | 256 MiB |" in text
    plot(points(), tmp_path / "plot.png")
    assert imread(tmp_path / "plot.png")[..., :3].std() > 0.01


def test_a_real_run(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/bench/scaling.py", "--ranks", "1", "2", "--modes", "weak"]
    command += ["--steps", "1", "data.tokens_per_rank=512"]
    command += ["--json", str(tmp_path / "scaling.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = from_json(json.loads((tmp_path / "scaling.json").read_text())["points"])
    assert [(p.num_ranks, p.tokens_per_step) for p in found] == [(1, 512), (2, 1024)]
    assert all(point.predicted_tokens_per_second > 0 for point in found)
    assert all(point.tokens_per_second > 0 for point in found)
