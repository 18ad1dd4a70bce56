"""What would make a layout fit, tried one change at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_ext.planning.device_profile import DeviceProfile
from megatron_ext.planning.layout import Layout, ModelSize
from megatron_ext.planning.predict import predict


def cures(model: ModelSize, layout: Layout, device: DeviceProfile) -> list[str]:
    """Changes by which the fullest rank fits, each with what it would hold, and its step."""
    found = []
    for words, changed in _changes(model, layout, device):
        prediction = predict(model, changed, device)
        if prediction.fits:
            found.append(
                f"{words}: {prediction.memory.total / 2**30:.1f} GiB, "
                f"{prediction.step_seconds:.3g} s a step"
            )
    return found


def _changes(
    model: ModelSize, layout: Layout, device: DeviceProfile
) -> Iterator[tuple[str, Layout]]:
    t, p = layout.tensor_size, layout.pipeline_size
    if layout.zero_stage == 0 and layout.data_size > 1:
        yield "parallel.use_distributed_optimizer=true", replace(layout, zero_stage=1)
    if t > 1 and not layout.sequence_parallel:
        yield "parallel.sequence_parallel=true", replace(layout, sequence_parallel=True)
    if layout.recompute != "full":
        full = replace(layout, recompute="full", recompute_num_layers=1)
        yield "parallel.recompute_granularity=full", full
    if layout.tokens_per_rank > model.sequence_length and layout.tokens_per_rank % 2 == 0:
        half = layout.tokens_per_rank // 2
        yield (
            f"data.tokens_per_rank={half}",
            replace(layout, tokens_per_rank=half, num_micro_batches=2 * layout.num_micro_batches),
        )
    sizes = (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    if 2 * t <= device.ranks_per_node and not any(size % (2 * t) for size in sizes):
        yield from _wider(f"parallel.tensor_model_parallel_size={2 * t}", layout, 2 * t, p)
    if model.num_layers % (2 * p * layout.virtual_size) == 0:
        yield from _wider(f"parallel.pipeline_model_parallel_size={2 * p}", layout, t, 2 * p)


def _wider(words: str, layout: Layout, tensor: int, pipeline: int) -> Iterator[tuple[str, Layout]]:
    """With as many ranks where they can be divided so, else with twice as many."""
    changed = replace(layout, tensor_size=tensor, pipeline_size=pipeline)
    if layout.num_ranks % (tensor * pipeline) == 0 and layout.data_size > 1:
        micro_batches = 2 * layout.num_micro_batches
        yield words, replace(changed, num_micro_batches=micro_batches)
    else:
        num_ranks = 2 * layout.num_ranks
        yield f"{words} on {num_ranks} ranks", replace(changed, num_ranks=num_ranks)
