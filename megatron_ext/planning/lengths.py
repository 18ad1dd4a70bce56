"""What the lengths of real text do to a prediction: attention's share, and ranks that wait.

Attention costs pairs, so documents count by the mean over tokens of their length, sum L^2 / sum L.
And no plan is perfect: the planner of the configuration plans one batch, and its efficiency (the
physical bound over the predicted step) divides the speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.model_shape import model_shape, stage_shape
from megatron_ext.planners import ask_planner
from megatron_ext.planning.device_profile import DeviceProfile
from parallel.errors import PlanError
from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel
from parallel.plan.predict import predict


@dataclass(frozen=True, slots=True)
class LengthEffect:
    """Of a batch of sequences."""

    attended_length: int
    """Tokens: documents of this length would need as much attention."""
    balance: float
    """Efficiency of the plan, in (0, 1]."""
    num_sequences: int


def length_effect(
    lengths: Sequence[int],
    config: Config,
    device: DeviceProfile,
    *,
    num_data_ranks: int,
    vocab_size: int,
) -> LengthEffect:
    """Plan the first batch of these documents as a run would.

    Raises:
        UserError: the planner cannot plan it.
    """
    tokens, longest = config.train.global_batch_tokens, config.data.max_sequence_length
    assert tokens is not None
    batch: list[int] = []
    total = 0
    for length in lengths:
        # A document is cut into sequences of at most the greatest length.
        parts = [longest] * (length // longest) + [length % longest] * (length % longest > 0)
        for part in parts:
            if total + part > tokens:
                break
            batch.append(part)
            total += part
    if not batch:
        raise UserError(f"no sequence fits a step of train.global_batch_tokens={tokens}")
    shape = stage_shape(config, model_shape(config, vocab_size))
    link = device.link(config.parallel.tensor_model_parallel_size * num_data_ranks)
    cost_model = CostModel.from_model(
        shape,
        flops_per_second=device.peak_flops("bf16") * device.gemm_efficiency,
        communication=RingCost.from_model(
            shape,
            bytes_per_second=link.gigabytes_per_second * 1e9,
            latency_seconds=link.microseconds * 1e-6,
        ),
    )
    try:
        plan = ask_planner(
            config.parallel.planner,
            batch,
            num_ranks=num_data_ranks,
            tokens_per_rank=config.data.micro_batch_tokens,
            cost_model=cost_model,
        )
        found = predict(plan, cost_model)
    except PlanError as error:
        raise UserError(f"the lengths cannot be planned: {error}") from None
    attended = sum(length * length for length in batch) / total
    return LengthEffect(round(attended), min(1.0, found.efficiency), len(batch))
