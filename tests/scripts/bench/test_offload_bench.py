"""The offload benchmark runs, on a CPU rank and small, and says what it should."""

from __future__ import annotations

from typing import Any

import torch

from tests.rank_pool import Ranks

CPU = torch.device("cpu")


def bench() -> tuple[list[dict[str, Any]], list[str], dict[str, float]]:
    from scripts.bench.offload import link_speed, make_config, measure, report_lines

    torch.set_num_threads(1)
    config = make_config(device="cpu", num_tokens=128, num_layers=3)
    rows = measure(config, CPU, num_tokens=128, ratios=(0.0, 0.5, 1.0), rounds=2)
    return rows, report_lines(rows), link_speed(CPU, num_bytes=1 << 16)


def test_offload_bench(ranks: Ranks) -> None:
    ((rows, lines, speed),) = ranks.run(1, bench, megatron=True)
    assert [row["ratio"] for row in rows] == [0.0, 0.5, 1.0]
    moved = [row["offloaded_bytes"] for row in rows]
    assert moved[0] == 0
    assert moved[2] == 2 * moved[1] > 0
    assert all(row["step_seconds"] > 0 for row in rows)
    # A CPU rank has no memory of its own to speak of.
    assert all(row["peak_bytes"] is None for row in rows)
    assert "ratio 0.50" in lines[1]
    assert all(value > 0 for value in speed.values())
