"""Seconds of a whole step: the pipeline's fill and drain, gradients' exchange, the optimizer.

With m micro-batches, p stages of t_s seconds each (forward and backward of one micro-batch) and v
chunks a stage, 1F1B and its interleaved form (Narayanan et al. 2021) take

    m max_s t_s + (sum_s t_s - max_s t_s) / v

of which the second part is the bubble: (p - 1) / (v m) of the first where all stages are equal.
Gradients are reduced and weights gathered once a step, P g (D - 1) / D and P w (D - 1) / D bytes a
rank; what overlaps hides behind the backward (forward) pass of one micro-batch. Sequences of
unequal length divide the step by the efficiency of the plan (`balance`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

from megatron_ext.planning.device_profile import DeviceProfile
from megatron_ext.planning.layout import Layout, ModelSize
from megatron_ext.planning.parameters import StageParameters, stage_layers, stage_parameters
from megatron_ext.planning.work import Work, layer_forward, layer_recomputed, output_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """What a step is spent on, on a rank of the slowest stage."""

    products: float
    attention: float
    memory: float
    overhead: float
    recomputation: float
    tensor: float
    experts: float
    ring: float
    pipeline: float
    """Messages between stages."""
    bubble: float
    data: float
    """Gradients and weights among data-parallel ranks, what does not hide."""
    optimizer: float
    imbalance: float
    """Ranks that wait for those with more to do."""

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def to_dict(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class _Stage:
    """One micro-batch of a stage."""

    forward: Work
    again: Work

    @property
    def seconds(self) -> float:
        return self.forward.total + self.forward.backward().total + self.again.total


def step_seconds(
    model: ModelSize, layout: Layout, device: DeviceProfile, *, balance: float = 1.0
) -> StepSeconds:
    """Predict one step.

    Args:
        balance: efficiency of the plan for the lengths of the corpus, in (0, 1].
    """
    stages = _stages(model, layout, device)
    slowest = max(stages, key=lambda stage: stage.seconds)
    rest = sum(stage.seconds for stage in stages) - slowest.seconds
    m = layout.num_micro_batches
    both = (slowest.forward + slowest.forward.backward()) * m
    ring = m * _ring(model, layout, device)
    messages = m * _messages(model, layout, device)
    bubble = rest / layout.virtual_size
    largest = max(
        (stage_parameters(model, layout, stage) for stage in _ends(layout)),
        key=lambda each: each.total,
    )
    busy = both.total + slowest.again.total * m + ring
    return StepSeconds(
        products=both.products,
        attention=both.attention,
        memory=both.memory,
        overhead=both.overhead,
        recomputation=slowest.again.total * m,
        tensor=both.tensor,
        experts=both.experts,
        ring=ring,
        pipeline=messages,
        bubble=bubble,
        data=_data(layout, device, largest, slowest),
        optimizer=_optimizer(layout, device, largest),
        imbalance=busy * (1.0 / balance - 1.0),
    )


def _stages(model: ModelSize, layout: Layout, device: DeviceProfile) -> list[_Stage]:
    kinds = {
        kind: (
            layer_forward(model, layout, device, has_experts=kind),
            layer_recomputed(model, layout, device, has_experts=kind),
        )
        for kind in {model.has_experts(layer) for layer in range(model.num_layers)}
    }
    made: dict[tuple[tuple[bool, int], ...], _Stage] = {}
    stages = []
    for number in range(layout.pipeline_size):
        counts = Counter(model.has_experts(layer) for layer in stage_layers(model, layout, number))
        key = tuple(sorted(counts.items()))
        if key not in made:
            forward, again = Work(), Work()
            for kind, count in key:
                forward += kinds[kind][0] * count
                again += kinds[kind][1] * count
            made[key] = _Stage(forward, again)
        stages.append(made[key])
    last = stages[-1]
    stages[-1] = _Stage(last.forward + output_forward(model, layout, device), last.again)
    return stages


def _ends(layout: Layout) -> set[int]:
    return {0, layout.pipeline_size // 2, layout.pipeline_size - 1}


def _ring(model: ModelSize, layout: Layout, device: DeviceProfile) -> float:
    """Keys and values that attention of one micro-batch does not hide, of all layers of a stage."""
    size = layout.context_size
    if size == 1:
        return 0.0
    layers = model.num_layers / layout.pipeline_size
    per_hop = layout.tokens_per_rank * model.key_value_size / layout.tensor_size
    link = device.link(size * layout.tensor_size)
    hop = link.seconds(per_hop * layout.weight_bytes)
    pairs = layout.tokens_per_rank * (model.sequence_length + 1) / 2
    flops = 4.0 * pairs * model.query_size / layout.tensor_size
    compute = flops / (device.peak_flops(layout.base_format) * device.attention_efficiency) / size
    # Backward sends keys, values and their gradients, and computes 2.5 times as much.
    exposed = max(0.0, hop - compute) + max(0.0, 2 * hop - 2.5 * compute)
    return layers * ((size - 1) * exposed + 2 * link.seconds(0.0))


def _messages(model: ModelSize, layout: Layout, device: DeviceProfile) -> float:
    """Of one micro-batch; interleaved stages send while they compute."""
    if layout.pipeline_size == 1 or layout.virtual_size > 1:
        return 0.0
    hidden = model.hidden_size / (layout.tensor_size if layout.sequence_parallel else 1)
    num_bytes = layout.tokens_per_rank * hidden * layout.weight_bytes
    return 2 * device.link(2 * layout.tensor_size * layout.data_size).seconds(num_bytes)


def _data(
    layout: Layout, device: DeviceProfile, parameters: StageParameters, stage: _Stage
) -> float:
    reduce = gather = 0.0
    groups = (
        (parameters.dense, layout.data_size, layout.tensor_size * layout.data_size),
        (
            parameters.experts,
            layout.expert_data_size,
            layout.expert_size * layout.expert_data_size,
        ),
    )
    for count, size, span in groups:
        if size > 1 and count:
            link, share = device.link(span), (size - 1) / size
            reduce += link.seconds(count * layout.grad_bytes * share, num_messages=size - 1)
            if layout.zero_stage:
                gather += link.seconds(count * layout.weight_bytes * share, num_messages=size - 1)
            else:
                # All-reduce: the gradients themselves are gathered.
                gather += link.seconds(count * layout.grad_bytes * share, num_messages=size - 1)
    if layout.zero_stage == 0:
        reduce, gather = reduce + gather, 0.0
    if layout.overlap_grad_reduce:
        reduce = max(0.0, reduce - stage.forward.backward().total - stage.again.total)
    if layout.overlap_param_gather:
        gather = max(0.0, gather - stage.forward.total)
    return reduce + gather


def _optimizer(layout: Layout, device: DeviceProfile, parameters: StageParameters) -> float:
    """States are read and written, gradients read, weights written."""
    dense, experts = float(parameters.dense), float(parameters.experts)
    if layout.zero_stage:
        dense, experts = dense / layout.data_size, experts / layout.expert_data_size
    per_element = 2 * layout.state_bytes + layout.grad_bytes + layout.weight_bytes
    # And once more all gradients: their norm, their reset.
    touched = (dense + experts) * per_element + 3 * parameters.total * layout.grad_bytes
    return device.memory_seconds(touched)
