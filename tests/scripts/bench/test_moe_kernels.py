"""The benchmark of the expert path's kernels runs, and reports what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from scripts.bench import moe_kernels


def test_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "kernels.json"
    arguments = ["--device", "cpu", "--shape", "32x16x8x4x2", "--rounds", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["moe_kernels.py", *arguments])
    num_threads = torch.get_num_threads()
    try:
        moe_kernels.main()
    finally:
        torch.set_num_threads(num_threads)
    report = json.loads(out.read_text())
    assert report["dtype"] == "float32"
    sides = {(result["kernel"], result["side"]) for result in report["results"]}
    for kernel in ("permute", "unpermute", "unpermute backward", "permute backward", "hash"):
        assert {(kernel, "ours"), (kernel, "torch ops")} <= sides
    assert ("grouped product", "loop") in sides
    assert {result["load"] for result in report["results"]} == {"uniform", "zipf"}
    assert all(result["seconds"] > 0 for result in report["results"])


def test_choices_are_different_and_uneven_under_zipf() -> None:
    experts = moe_kernels.choose_experts(400, 8, 3, "zipf")
    assert all(len(set(row)) == 3 for row in experts.tolist())
    counts = torch.bincount(experts.reshape(-1), minlength=8)
    assert counts[0] > 2 * counts[7]
