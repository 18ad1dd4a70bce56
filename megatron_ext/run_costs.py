"""The cost model that a run plans with: measured, or estimated from the model's shape.

Every rank, and every restart of a run, must get the same numbers, or they would make different
plans. So nothing here is measured: without a profile the estimate rests on data sheets and stated
constants. For balance only their ratios matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config import Config
from megatron_ext.cost_profile import load_cost_model, subject_of
from megatron_ext.devices import RunDevice
from megatron_ext.model_shape import stage_shape
from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel
from parallel.plan.flops import ModelShape
from parallel.plan.offload_ratio import HostMemory

# What training attains of a data sheet's peak.
_ATTAINED = 0.45
# A core with and without bf16 in hardware lies on either side of it.
_CPU_FLOPS_PER_SECOND = 1e11
_UNKNOWN_FLOPS_PER_SECOND = 2e14
# Of one rank, one way: gloo on one host; a 400 Gbit/s network card per GPU.
_LINK_BYTES_PER_SECOND = {"cpu": 1e9, "cuda": 50e9}
# PCIe 5 x16 with half of it lost to sharing; a copy within memory on a CPU.
_HOST_BYTES_PER_SECOND = {"cpu": 5e9, "cuda": 25e9}
_LATENCY_SECONDS = {"cpu": 200e-6, "cuda": 20e-6}


@dataclass(frozen=True, slots=True)
class RunCosts:
    """What planners are told of one rank."""

    cost_model: CostModel
    host_memory: HostMemory | None = None
    """Where activations may wait; None: they stay on the device."""


def run_costs(config: Config, shape: ModelShape, device: RunDevice) -> RunCosts:
    """The costs of one rank of this run."""
    host_memory = None
    if config.parallel.offload_activations:
        host_memory = HostMemory.from_model(
            stage_shape(config, shape),
            bytes_per_element=device.dtype.itemsize,
            bytes_per_second=_HOST_BYTES_PER_SECOND[device.device.type],
        )
    return RunCosts(_cost_model(config, shape, device), host_memory)


def _cost_model(config: Config, shape: ModelShape, device: RunDevice) -> CostModel:
    if config.parallel.cost_profile is not None:
        subject = subject_of(
            config,
            device=device.info.name,
            dtype=str(device.dtype),
            vocab_size=shape.vocab_size,
        )
        return load_cost_model(Path(config.parallel.cost_profile), subject=subject)
    kind = device.device.type
    stage = stage_shape(config, shape)
    return CostModel.from_model(
        stage,
        flops_per_second=_flops_per_second(device),
        communication=RingCost.from_model(
            stage,
            bytes_per_second=_LINK_BYTES_PER_SECOND[kind],
            latency_seconds=_LATENCY_SECONDS[kind],
            bytes_per_element=device.dtype.itemsize,
        ),
    )


def _flops_per_second(device: RunDevice) -> float:
    if device.device.type == "cpu":
        return _CPU_FLOPS_PER_SECOND
    sheet_peak = device.info.peak(device.dtype)
    return _ATTAINED * sheet_peak.flops_per_second if sheet_peak else _UNKNOWN_FLOPS_PER_SECOND
