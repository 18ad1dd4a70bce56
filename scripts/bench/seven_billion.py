"""The 7B model that the planners' benchmarks are about, and what it costs a rank."""

from __future__ import annotations

from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel
from parallel.plan.flops import ModelShape

SEVEN_BILLION = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11_008,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128_256,
)


def seven_billion_cost(
    *,
    flops_per_second: float = 400e12,
    bytes_per_second: float = 50e9,
    latency_seconds: float = 10e-6,
    fixed_seconds: float = 1e-3,
) -> CostModel:
    """flops_per_second: attained. bytes_per_second: of a rank's link. latency_seconds: of one
    message. fixed_seconds: g."""
    return CostModel.from_model(
        SEVEN_BILLION,
        flops_per_second=flops_per_second,
        fixed_seconds=fixed_seconds,
        communication=RingCost.from_model(
            SEVEN_BILLION, bytes_per_second=bytes_per_second, latency_seconds=latency_seconds
        ),
    )
