"""What one rank of a run works with: mesh, model, optimizer, data and its place in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_ext.activation_offload import ActivationOffload, install_offload
from megatron_ext.checkpoint.checkpoint import TrainState
from megatron_ext.checkpoint.state import num_updates
from megatron_ext.config import Config
from megatron_ext.console import TrainConsole
from megatron_ext.devices import RunDevice
from megatron_ext.expert_balance import ExpertBalance
from megatron_ext.expert_compression import ExpertCompression
from megatron_ext.expert_schedule import schedule_experts
from megatron_ext.expert_traffic import ExpertTraffic
from megatron_ext.held_out import HeldOut, plan_held_out
from megatron_ext.mesh import Mesh, start_mesh, stop_mesh
from megatron_ext.model import (
    build_model,
    padded_vocab_size,
    wrap_data_parallel,
)
from megatron_ext.model_shape import model_shape
from megatron_ext.optimizer import build_optimizer
from megatron_ext.precision.chosen_recipe import chosen_recipe, recipe_digest
from megatron_ext.precision.install import LowPrecision, install_low_precision
from megatron_ext.run_costs import RunCosts, run_costs
from megatron_ext.step import connect_gradients
from megatron_ext.step_loader import StepLoader
from megatron_ext.training_data import BatchReader, TrainingData, open_corpora
from parallel.plan.flops import ModelShape


@dataclass
class Run:
    """What one rank works with."""

    config: Config
    run_dir: Path
    mesh: Mesh
    device: RunDevice
    data: TrainingData
    chunks: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    reader: BatchReader
    loader: StepLoader
    shape: ModelShape
    costs: RunCosts
    offload: ActivationOffload | None
    balance: ExpertBalance | None
    """Of a model with experts."""
    traffic: ExpertTraffic | None
    """Where ranks share the experts."""
    compression: ExpertCompression | None
    low_precision: LowPrecision | None
    console: TrainConsole
    step: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0

    def state(self) -> TrainState:
        return TrainState(
            step=self.step,
            num_updates=num_updates(self.optimizer),
            skipped_steps=self.skipped_steps,
            tokens=self.tokens,
            cursor=self.loader.cursor.to_dict(),
            data_fingerprint=self.data.fingerprint,
            layout=self.layout,
            optimizer=self.config.optim.optimizer,
            has_main_parameters=self.device.dtype != torch.float32,
            precision_recipe=recipe_digest(self.config),
        )

    @cached_property
    def held_out(self) -> HeldOut:
        """What validation runs; all ranks ask for it together."""
        return plan_held_out(
            self.data,
            self.config,
            num_data_ranks=self.mesh.data_size,
            costs=self.costs,
            device=self.device.device,
        )

    @property
    def layout(self) -> dict[str, int]:
        parallel = self.config.parallel
        return {
            "tensor_model_parallel_size": self.mesh.tensor_size,
            "pipeline_model_parallel_size": self.mesh.pipeline_size,
            "virtual_pipeline_model_parallel_size": (
                parallel.virtual_pipeline_model_parallel_size or 1
            ),
            "data_parallel_size": self.mesh.data_size,
            "expert_model_parallel_size": self.mesh.expert_size,
        }


@contextmanager
def open_run(config: Config, device: RunDevice, run_dir: Path) -> Iterator[Run]:
    """Build model, optimizer and data on this rank; the process group must be running.

    Args:
        config: checked and filled in (`config_check.check_config`).
    """
    mesh = start_mesh(config)
    loader = None
    try:
        data = TrainingData(config, open_corpora(config))
        vocab_size = padded_vocab_size(config.model, data.tokenizer.vocab_size)
        console = TrainConsole(
            train_iters=config.train.train_iters,
            log_interval=config.log.log_interval,
            enabled=mesh.is_first_rank,
        )
        model = build_model(
            config,
            mesh=mesh,
            vocab_size=vocab_size,
            dtype=device.dtype,
            is_cuda=device.is_cuda,
        )
        low_precision = install_low_precision(
            model, config, chosen_recipe(config), rank=dist.get_rank()
        )
        compression = ExpertCompression(model, config) if config.lsh_layers else None
        gaps = schedule_experts(model, config, compression=compression, say=console.say)
        chunks = wrap_data_parallel(model, config, gaps=gaps)
        optimizer = build_optimizer(chunks, config, dtype=device.dtype)
        connect_gradients(chunks)
        balance = ExpertBalance(chunks, config) if any(config.moe_layers) else None
        offload = None
        if config.parallel.offload_activations:
            offload = install_offload(chunks, device=device.device)
        shape = model_shape(config, vocab_size)
        costs = run_costs(config, shape, device)
        reader = BatchReader.for_model(config, mesh=mesh, device=device.device)
        loader = StepLoader(data, reader, config, costs=costs, is_ahead=config.data.prefetch)
        yield Run(
            config=config,
            run_dir=run_dir,
            mesh=mesh,
            device=device,
            data=data,
            chunks=chunks,
            optimizer=optimizer,
            reader=reader,
            loader=loader,
            shape=shape,
            costs=costs,
            offload=offload,
            balance=balance,
            traffic=ExpertTraffic(chunks, config) if mesh.expert_size > 1 else None,
            compression=compression,
            low_precision=low_precision,
            console=console,
        )
    finally:
        if loader is not None:
            loader.close()
        stop_mesh()
