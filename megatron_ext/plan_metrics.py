"""How good a step's plan was, and what it moved: figures for `metrics.jsonl`."""

from __future__ import annotations

from megatron_ext.metrics import Record
from megatron_ext.step import StepSums
from megatron_ext.step_loader import PreparedStep


def plan_metrics(prepared: PreparedStep, sums: StepSums) -> Record:
    """Balance, padding and bytes of a step, over all ranks."""
    return {
        "plan_efficiency": prepared.efficiency,
        "padding_share": 1.0 - sums.num_tokens / sums.num_rows,
        "bytes_sent": sums.bytes_sent,
        "offloaded_bytes": sums.offloaded_bytes,
    }
