"""Which rank is which: megatron's tensor, pipeline, data and expert-parallel groups.

Ranks are numbered tensor-parallel first, then data, then pipeline. Within a pipeline stage the same
ranks are divided a second time for the experts: `expert_size` consecutive ones share the experts of
a layer, and those `expert_size` apart hold the same ones (the expert-data ranks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_ext.config import Config
from megatron_ext.token_dispatcher import expert_node_groups
from moe.dispatch.hierarchical import NodeGroups

Axis: TypeAlias = Literal["tensor", "expert"]
"""Along which a parameter is spread."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of one axis and this one's place among them."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes and this rank's coordinates along the axes, with their process groups."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    expert_rank: int
    expert_size: int
    expert_data_rank: int
    expert_data_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup
    expert_data_group: dist.ProcessGroup
    expert_node_groups: NodeGroups | None
    """How the expert group lies on nodes, where tokens travel by it."""

    def along(self, axis: Axis) -> Ranks:
        """Over whom a parameter of this axis is spread."""
        if axis == "expert":
            return Ranks(self.expert_rank, self.expert_size, self.expert_group)
        return Ranks(self.tensor_rank, self.tensor_size, self.tensor_group)

    def replicas(self, axis: Axis) -> Ranks:
        """Who holds the same block of a parameter of this axis, and shares its gradient."""
        if axis == "expert":
            return Ranks(self.expert_data_rank, self.expert_data_size, self.expert_data_group)
        return Ranks(self.data_rank, self.data_size, self.data_group)

    @property
    def is_first_rank(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


def start_mesh(config: Config) -> Mesh:
    """Build megatron's process groups over the running default group and seed its random states."""
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        # An expert is whole on its rank: tensor-parallel ranks are ranks like others to it.
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=config.launch.timeout_seconds / 60.0,
    )
    # NCCL and RCCL want all ranks of a group there before two of them talk alone.
    dist.barrier(group=parallel_state.get_data_parallel_group())
    tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed, force_reset_rng=True)
    expert_group = parallel_state.get_expert_model_parallel_group()
    expert_data_group = parallel_state.get_expert_data_parallel_group()
    return Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        expert_rank=expert_group.rank(),
        expert_size=expert_group.size(),
        expert_data_rank=expert_data_group.rank(),
        expert_data_size=expert_data_group.size(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        expert_group=expert_group,
        expert_data_group=expert_data_group,
        expert_node_groups=expert_node_groups(config, expert_group),
    )


def stop_mesh() -> None:
    """Forget megatron's groups; the default group stays."""
    parallel_state.destroy_model_parallel()
