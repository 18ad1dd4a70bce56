"""How good a step's plan was, and what it moved: figures for `metrics.jsonl`."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_ext.metrics import Record
from megatron_ext.run import Run
from megatron_ext.step_loader import PreparedStep


def plan_metrics(run: Run, prepared: PreparedStep, *, sent_before: int) -> Record:
    """Balance, padding and bytes over all ranks; every rank calls this behind each step.

    Args:
        sent_before: bytes that this rank had sent when the step began.
    """
    moved = run.offload.end_step().offloaded_bytes if run.offload is not None else 0
    rows = sum(len(batch.tokens) for batch in prepared.batches)
    used = sum(batch.num_unmasked_tokens for batch in prepared.batches)
    sent = run.reader.exchange.traffic.num_bytes_sent - sent_before
    sums = torch.tensor([sent, moved, rows, used], dtype=torch.float64, device=run.device.device)
    dist.all_reduce(sums)
    bytes_sent, offloaded_bytes, num_rows, num_used = sums.tolist()
    return {
        "plan_efficiency": prepared.efficiency,
        "padding_share": 1.0 - num_used / num_rows,
        "bytes_sent": round(bytes_sent),
        "offloaded_bytes": round(offloaded_bytes),
    }
