"""Which rank is which: megatron's tensor, pipeline and data-parallel groups for this process."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_ext.config import Config


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes and this rank's coordinates along the three axes, with their process groups."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup

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
        create_gloo_process_groups=False,
        distributed_timeout_minutes=config.launch.timeout_seconds / 60.0,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed, force_reset_rng=True)
    return Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
    )


def stop_mesh() -> None:
    """Forget megatron's groups; the default group stays."""
    parallel_state.destroy_model_parallel()
