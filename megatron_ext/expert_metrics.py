"""How evenly each layer's experts were loaded in a step: figures for `metrics.jsonl`.

Lists with one entry for each layer that has experts, in the order of the layers. They are made of
the step's counts over all ranks and micro-batches, which `expert_balance` adds up in its one
collective behind the last micro-batch; here nothing is exchanged (`moe.expert_load` has the
formulas).
"""

from __future__ import annotations

from torch import Tensor

from megatron_ext.metrics import Record
from moe.expert_load import dropped_share, load_entropy, max_over_mean


def expert_metrics(counts: Tensor, demand: Tensor) -> Record:
    """Balance and losses by layer.

    Args:
        counts: [num_layers, num_experts], choices that were computed, of the whole step.
        demand: [num_layers, num_experts], all choices, those that were dropped too.
    """
    return {
        "expert_load_max_over_mean": max_over_mean(counts).tolist(),
        "expert_load_entropy": load_entropy(counts).tolist(),
        "expert_dropped_share": dropped_share(counts, demand).tolist(),
    }
