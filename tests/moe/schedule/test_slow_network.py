"""On a slow network chunks are faster than one thing after another: two hosts, a shaped link."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Exchanges of a step take about 0.3 s, the experts of an idle core about 0.2 s.
SHAPE = {
    "hosts": 2,
    "ranks-per-host": 1,
    "mbit": 50,
    "layers": 1,
    "tokens": 512,
    "hidden-size": 256,
    "ffn-size": 2048,
    "steps": 3,
    "chunks": "4",
    "ways": "exact",
}


@pytest.mark.netns
def test_chunks_beat_the_serial_way(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = [text for name, value in SHAPE.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench.moe_network", *options, "--output", str(report)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    way = json.loads(report.read_text())["ways"]["exact"]
    best = max(tried["speedup_over_serial"] for tried in way["chunks"])
    assert best > 1.05, done.stdout
