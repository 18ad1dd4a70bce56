"""The steps in which the held-out documents are run, planned once: they are the same every time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ext.config import Config
from megatron_ext.plan_agreement import agree_on_plan
from megatron_ext.planners import plan_step
from megatron_ext.run_costs import RunCosts
from megatron_ext.training_data import SequenceRef, TrainingData, validation_groups
from parallel.plan.records import StepPlan

# Held-out sequences are run in steps of this many micro-batches per rank.
_MICRO_BATCHES_PER_STEP = 16
# The held-out documents stay the same when train.seed changes, so that runs can be compared.
_ORDER_SEED = 0


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Whole documents, in steps."""

    steps: tuple[tuple[StepPlan, list[SequenceRef]], ...]
    """Empty where the corpora hold nothing out."""
    num_bytes: int
    """Of text."""


def plan_held_out(
    data: TrainingData,
    config: Config,
    *,
    num_data_ranks: int,
    costs: RunCosts,
    device: torch.device,
) -> HeldOut:
    """The same on every rank, which all call this together.

    Raises:
        UserError: ranks planned differently.
    """
    refs, lengths, num_bytes = data.validation_documents(config.train.eval_tokens, seed=_ORDER_SEED)
    steps = []
    for step_refs, step_lengths in validation_groups(
        refs,
        lengths,
        tokens_per_group=_MICRO_BATCHES_PER_STEP * config.data.micro_batch_tokens * num_data_ranks,
    ):
        plan = plan_step(step_lengths, config, num_data_ranks=num_data_ranks, costs=costs)
        agree_on_plan(plan.digest(), device=device)
        steps.append((plan, step_refs))
    return HeldOut(tuple(steps), num_bytes)
