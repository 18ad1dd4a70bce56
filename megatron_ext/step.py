"""The executor: runs the micro-batches of a plan through megatron's pipeline schedules.

The loss of a micro-batch is a sum over tokens; megatron divides the gradients once by the global
batch's count of unmasked tokens. So nothing depends on how the batch was cut (idea 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_ext.activation_offload import ActivationOffload
from megatron_ext.batch import HostBatch, PackedBatch
from megatron_ext.linear_cross_entropy import linear_cross_entropy
from megatron_ext.model import output_weight, unwrap
from megatron_ext.training_data import BatchReader


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums over the whole global batch and all ranks."""

    loss_sum: float
    """With z-loss: what is minimised."""
    cross_entropy_sum: float
    num_tokens: int
    num_rows: int
    """Tokens of all micro-batches with their padding."""
    bytes_sent: int
    """Between ranks that share sequences."""
    offloaded_bytes: int

    @property
    def mean(self) -> float:
        return self.cross_entropy_sum / max(1, self.num_tokens)


def connect_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Tell megatron's schedules how gradients are held back, reduced and divided."""
    megatron_config = unwrap(chunks[0]).config
    no_sync = [chunk.no_sync for chunk in chunks]
    megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    megatron_config.finalize_model_grads_func = finalize_model_grads
    if len(chunks) > 1 and chunks[0].ddp_config.overlap_grad_reduce:
        # Interleaved chunks finish at different times; each starts its own reduction.
        megatron_config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]


def gather_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Make all weights current where their gathering waits for the next forward pass."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def run_micro_batches(
    chunks: Sequence[nn.Module],
    batches: Sequence[HostBatch],
    *,
    reader: BatchReader,
    z_loss_coeff: float = 0.0,
    forward_only: bool = False,
    offload: ActivationOffload | None = None,
) -> StepSums:
    """Forward (and backward) of this rank's micro-batches, and the sums over all ranks.

    Args:
        chunks: model chunks of this rank, wrapped for data parallelism when training.
        batches: this rank's micro-batches, at least one. Ranks of one model replica pass the same.
        reader: puts a micro-batch on the device when its turn comes.
        offload: what was installed around the chunks; its step ends here.
    """

    def forward_step(iterator: Iterator[PackedBatch], chunk: nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        output = chunk(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=None,
            packed_seq_params=batch.documents,
        )
        return output, lambda hidden: _micro_batch_loss(
            hidden, output_weight(chunk), batch, reader, z_loss_coeff
        )

    sent_before = reader.exchange.traffic.num_bytes_sent
    reports = _run_schedule(chunks, batches, forward_step, reader, forward_only=forward_only)
    bytes_sent = reader.exchange.traffic.num_bytes_sent - sent_before
    offloaded_bytes = offload.end_step().offloaded_bytes if offload is not None else 0
    return _sum_over_ranks(reports, batches, reader, moved=(bytes_sent, offloaded_bytes))


def run_logits(
    chunks: Sequence[nn.Module], batch: HostBatch, *, reader: BatchReader, row: int
) -> Tensor | None:
    """Logits of one token of one micro-batch, float32 [vocab_size], on the last stage.

    Returns:
        None on the other pipeline stages.
    """

    def forward_step(iterator: Iterator[PackedBatch], chunk: nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        output = chunk(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=None,
            packed_seq_params=batch.documents,
        )
        return output, lambda hidden, non_loss_data=True: nn.functional.linear(
            hidden[0, row], output_weight(chunk)
        ).float()

    mesh = reader.mesh
    # Interleaved stages take no fewer micro-batches than there are stages.
    batches = [batch] * (mesh.pipeline_size if len(chunks) > 1 else 1)
    rows = _run_schedule(
        chunks, batches, forward_step, reader, forward_only=True, collect_non_loss_data=True
    )
    if not mesh.is_last_stage:
        return None
    local: Tensor = rows[0]
    if mesh.tensor_size == 1:
        return local
    whole = torch.empty(mesh.tensor_size * local.numel(), device=local.device)
    dist.all_gather_into_tensor(whole, local.contiguous(), group=mesh.tensor_group)
    return whole


def _run_schedule(
    chunks: Sequence[nn.Module],
    batches: Sequence[HostBatch],
    forward_step: Callable[..., Any],
    reader: BatchReader,
    *,
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    iterators = iterators_of_chunks(batches, reader, num_chunks=len(chunks))
    # Routers count the tokens of passes with a gradient.
    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(  # type: ignore[no-any-return]
            forward_step_func=forward_step,
            data_iterator=list(iterators) if len(chunks) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            # All rows of a step are of one length where the pipeline has stages to exchange them.
            seq_length=len(batches[0].tokens),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )


def iterators_of_chunks(
    batches: Sequence[HostBatch], reader: BatchReader, *, num_chunks: int
) -> list[Iterator[PackedBatch]]:
    """For each model chunk of this rank the micro-batches on the device, as their turns come.

    The chunks share a micro-batch's tensors, which are given up when the last of them has taken it:
    angles alone are a kilobyte a token, so those of a whole step would fill a device.
    """
    on_device: dict[int, PackedBatch] = {}

    def take(chunk: int, index: int) -> PackedBatch:
        # The schedule runs a micro-batch through the chunks in their order.
        packed = reader.to_device(batches[index]) if chunk == 0 else on_device.pop(index)
        if chunk + 1 < num_chunks:
            on_device[index] = packed
        return packed

    return [map(partial(take, chunk), range(len(batches))) for chunk in range(num_chunks)]


def _micro_batch_loss(
    hidden: Tensor, weight: Tensor, batch: PackedBatch, reader: BatchReader, z_loss_coeff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss to differentiate, tokens, report [loss sum, cross-entropy sum])."""
    num_unmasked = batch.num_unmasked_tokens
    # What follows the unmasked tokens is padding and has no loss. Some of it is computed with them,
    # for few different shapes of products.
    num_rows = min(reader.row_length(num_unmasked), hidden.shape[1])
    rows = torch.arange(num_rows, device=hidden.device)
    loss_sum, cross_entropy = linear_cross_entropy(
        hidden[0, :num_rows],
        weight,
        batch.labels[0, :num_rows],
        group=reader.mesh.tensor_group,
        token_weights=(rows < num_unmasked).float(),
        z_loss_coeff=z_loss_coeff,
    )
    report = torch.stack([loss_sum.detach(), cross_entropy[:num_unmasked].sum()]).double()
    num_tokens = torch.tensor(num_unmasked, dtype=torch.int, device=batch.tokens.device)
    return loss_sum, num_tokens, report


def _sum_over_ranks(
    reports: list[Tensor],
    batches: Sequence[HostBatch],
    reader: BatchReader,
    *,
    moved: tuple[int, int],
) -> StepSums:
    """One reduction for all figures of a step.

    moved: bytes that this rank has sent and offloaded.
    """
    mesh = reader.mesh
    sums = torch.zeros(6, dtype=torch.float64, device=reader.device)
    # Tensor-parallel ranks hold equal sums, and other stages the same micro-batches: one speaks.
    if mesh.is_last_stage and mesh.tensor_rank == 0:
        for report in reports:
            sums[:2] += report
        sums[2] = sum(batch.num_unmasked_tokens for batch in batches)
        sums[3] = sum(len(batch.tokens) for batch in batches)
    sums[4], sums[5] = moved
    dist.all_reduce(sums)
    loss_sum, cross_entropy_sum, *counts = sums.tolist()
    num_tokens, num_rows, bytes_sent, offloaded_bytes = map(round, counts)
    return StepSums(loss_sum, cross_entropy_sum, num_tokens, num_rows, bytes_sent, offloaded_bytes)
