"""TensorBoard and W&B get what metrics.jsonl gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.config import LogConfig
from megatron_ext.metrics import Record, open_sinks, read_metrics

RECORDS: list[Record] = [
    {"step": 1, "loss": 2.5, "validation_loss": None},
    {"step": 2, "loss": 1.5},
]


def write_all(log: LogConfig, run_dir: Path) -> None:
    sinks = open_sinks(log, run_dir, after_step=0)
    for record in RECORDS:
        for sink in sinks:
            sink.write(record)
    for sink in sinks:
        sink.close()
    assert read_metrics(run_dir / "metrics.jsonl") == RECORDS


def test_tensorboard(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    write_all(LogConfig(tensorboard=True), tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_all(LogConfig(wandb_project="test"), tmp_path)
    (run_file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert run_file.stat().st_size > 0
