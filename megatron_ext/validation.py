"""Held-out loss and bits per byte.

bits per byte = sum of cross entropy over all predictions / (ln 2 * bytes of text). Documents are
taken whole, so every byte of them is predicted once and the figure does not depend on the
tokenizer; the end of each document is predicted too and counts as no byte. With experts, what the
tokens of each domain choose is counted on the way (`expert_domains`).
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch

from megatron_ext.expert_domains import DomainCounts, report_domains
from megatron_ext.metrics import Record
from megatron_ext.run import Run
from megatron_ext.step import gather_parameters, run_micro_batches


@torch.no_grad()
def validate(run: Run) -> Record:
    """Loss and bits per byte of the held-out documents; every rank calls this."""
    if not run.held_out.steps:
        # A corpus too small to hold anything out, or prepared with --validation-fraction 0.
        return {}
    # Not inside the first forward, which may have to meet another rank's second (see `train_step`).
    gather_parameters(run.chunks)
    for chunk in run.chunks:
        chunk.eval()
    counts = DomainCounts(run) if run.config.moe.num_moe_experts else None
    total = 0.0
    num_tokens = 0
    for plan, refs in run.held_out.steps:
        batches = run.reader.read(plan, refs, run.data.validation)
        with counts.watch(batches, refs) if counts else nullcontext():
            sums = run_micro_batches(run.chunks, batches, reader=run.reader, forward_only=True)
        total += sums.cross_entropy_sum
        num_tokens += sums.num_tokens
    for chunk in run.chunks:
        chunk.train()
    record: Record = {
        "validation_loss": total / num_tokens,
        "validation_bits_per_byte": total / (math.log(2.0) * max(1, run.held_out.num_bytes)),
    }
    return record | report_domains(run, counts) if counts else record
