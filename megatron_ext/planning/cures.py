"""What would make a layout fit, tried one change at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_ext.planning.device_profile import DeviceProfile
from megatron_ext.planning.layout import Layout, ModelSize
from megatron_ext.planning.predict import predict
from megatron_ext.planning.search import Choice, refusal


def cures(
    model: ModelSize, layout: Layout, device: DeviceProfile, *, balance: float = 1.0
) -> list[str]:
    """Changes by which the fullest rank fits, each with what it would hold, and its step."""
    found = []
    for words, changed in _changes(layout):
        if _is_refused(changed, model, device):
            continue
        prediction = predict(model, changed, device, balance=balance)
        if prediction.fits:
            found.append(
                f"{words}: {prediction.memory.total / 2**30:.1f} GiB, "
                f"{prediction.step_seconds:.3g} s a step"
            )
    return found


def _changes(layout: Layout) -> Iterator[tuple[str, Layout]]:
    if layout.zero_stage == 0 and layout.data_size > 1:
        yield "parallel.use_distributed_optimizer=true", replace(layout, zero_stage=1)
    if layout.tensor_size > 1 and not layout.sequence_parallel:
        yield "parallel.sequence_parallel=true", replace(layout, sequence_parallel=True)
    if layout.recompute == "none":
        words = "parallel.recompute_granularity=selective"
        yield words, replace(layout, recompute="selective", recompute_modules=("core_attn",))
    if layout.recompute != "full":
        full = replace(layout, recompute="full", recompute_num_layers=1)
        yield "parallel.recompute_granularity=full", full
    if layout.tokens_per_rank % 2 == 0:
        half = layout.tokens_per_rank // 2
        yield (
            f"data.tokens_per_rank={half}",
            replace(layout, tokens_per_rank=half, num_micro_batches=2 * layout.num_micro_batches),
        )
    expert = 2 * layout.expert_size
    yield f"parallel.expert_model_parallel_size={expert}", replace(layout, expert_size=expert)
    yield from _wider(layout, tensor=2 * layout.tensor_size)
    yield from _wider(layout, pipeline=2 * layout.pipeline_size)


def _wider(
    layout: Layout, *, tensor: int | None = None, pipeline: int | None = None
) -> Iterator[tuple[str, Layout]]:
    """With as many ranks, or with twice as many and the same copies of the model."""
    if tensor is not None:
        words = f"parallel.tensor_model_parallel_size={tensor} parallel.sequence_parallel=true"
        changed = replace(layout, tensor_size=tensor, sequence_parallel=True)
    else:
        assert pipeline is not None
        words = f"parallel.pipeline_model_parallel_size={pipeline}"
        changed = replace(layout, pipeline_size=pipeline)
    if layout.data_size > 1:
        yield words, replace(changed, num_micro_batches=2 * layout.num_micro_batches)
    num_ranks = 2 * layout.num_ranks
    yield f"{words} on {num_ranks} ranks", replace(changed, num_ranks=num_ranks)


def _is_refused(layout: Layout, model: ModelSize, device: DeviceProfile) -> bool:
    """Whether it could not run, whatever the memory."""
    if layout.num_ranks % (layout.tensor_size * layout.pipeline_size):
        return True
    if layout.tokens_per_rank * layout.context_size < model.sequence_length:
        return True
    choice = Choice(
        tensor=layout.tensor_size,
        pipeline=layout.pipeline_size,
        expert=layout.expert_size,
        sequences=1,
        recompute=layout.recompute,
        # ZeRO-1 of one copy is no mistake, only no gain.
        zero=0,
    )
    if layout.expert_size > 1 and not model.num_experts:
        return True
    if model.num_layers % (layout.pipeline_size * layout.virtual_size):
        return True
    return bool(
        refusal(
            choice,
            model,
            layout,
            device,
            round_tokens=layout.tokens_per_rank,
            global_batch_tokens=layout.tokens_per_step,
        )
        or layout.tensor_size > device.ranks_per_node
    )
