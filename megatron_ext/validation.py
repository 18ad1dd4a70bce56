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
from megatron_ext.plan_agreement import agree_on_plan
from megatron_ext.planners import plan_step
from megatron_ext.run import Run
from megatron_ext.step import run_micro_batches
from megatron_ext.training_data import validation_groups

# Held-out sequences are run in steps of this many micro-batches per rank.
_MICRO_BATCHES_PER_STEP = 16
# The held-out documents stay the same when train.seed changes, so that runs can be compared.
_ORDER_SEED = 0


@torch.no_grad()
def validate(run: Run) -> Record:
    """Loss and bits per byte of the held-out documents; every rank calls this."""
    refs, lengths, num_bytes = run.data.validation_documents(
        run.config.train.eval_tokens, seed=_ORDER_SEED
    )
    if not refs:
        # A corpus too small to hold anything out, or prepared with --validation-fraction 0.
        return {}
    for chunk in run.chunks:
        chunk.eval()
    counts = DomainCounts(run) if run.config.moe.num_moe_experts else None
    total = 0.0
    num_tokens = 0
    tokens_per_group = (
        _MICRO_BATCHES_PER_STEP * run.config.data.micro_batch_tokens * run.mesh.data_size
    )
    for group_refs, group_lengths in validation_groups(
        refs, lengths, tokens_per_group=tokens_per_group
    ):
        plan = plan_step(
            group_lengths,
            run.config,
            num_data_ranks=run.mesh.data_size,
            costs=run.costs,
        )
        agree_on_plan(plan.digest(), device=run.device.device)
        batches = run.reader.read(plan, group_refs, run.data.validation)
        with counts.watch(batches, group_refs) if counts else nullcontext():
            loss = run_micro_batches(run.chunks, batches, reader=run.reader, forward_only=True)
        total += loss.cross_entropy_sum
        num_tokens += loss.num_tokens
    for chunk in run.chunks:
        chunk.train()
    record: Record = {
        "validation_loss": total / num_tokens,
        "validation_bits_per_byte": total / (math.log(2.0) * max(1, num_bytes)),
    }
    return record | report_domains(run, counts) if counts else record
