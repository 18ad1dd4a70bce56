"""Memory, time and speed of one layout on one device: what `plan` tells and `search` asks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.planning.device_profile import DeviceProfile
from megatron_ext.planning.layout import Layout, ModelSize
from megatron_ext.planning.memory import MemoryBytes, stage_memory
from megatron_ext.planning.parameters import attention_parameters
from megatron_ext.planning.step_time import StepSeconds, step_seconds

_SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of one layout."""

    layout: Layout
    stages: tuple[MemoryBytes, ...]
    """Of one rank of each pipeline stage."""
    usable_bytes: float
    seconds: StepSeconds
    model_flops: float
    """Of a step: what the mathematics needs, recomputation not counted."""
    executed_flops: float
    """The same with what is computed again, as some publications count."""
    peak_flops: float
    """Of one device, in bf16 (fp32 where it has none): what MFU divides by."""

    @property
    def memory(self) -> MemoryBytes:
        """Of the fullest rank."""
        return max(self.stages, key=lambda each: each.total)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable_bytes

    @property
    def step_seconds(self) -> float:
        return self.seconds.total

    @property
    def tokens_per_second(self) -> float:
        return self.layout.tokens_per_step / self.step_seconds

    @property
    def model_tflops_per_device(self) -> float:
        return self.model_flops / self.step_seconds / self.layout.num_ranks / 1e12

    @property
    def executed_tflops_per_device(self) -> float:
        return self.executed_flops / self.step_seconds / self.layout.num_ranks / 1e12

    @property
    def mfu(self) -> float:
        return self.model_tflops_per_device * 1e12 / self.peak_flops

    def days(self, tokens: float) -> float:
        return tokens / self.tokens_per_second / _SECONDS_PER_DAY

    def device_hours(self, tokens: float) -> float:
        return self.days(tokens) * 24 * self.layout.num_ranks


def predict(
    model: ModelSize, layout: Layout, device: DeviceProfile, *, balance: float = 1.0
) -> Prediction:
    """Predict a step.

    Args:
        balance: efficiency of the plan for the lengths of the corpus, in (0, 1].
    """
    return Prediction(
        layout=layout,
        stages=tuple(
            stage_memory(model, layout, stage, fixed_bytes=device.fixed_bytes)
            for stage in range(layout.pipeline_size)
        ),
        usable_bytes=device.usable_bytes,
        seconds=step_seconds(model, layout, device, balance=balance),
        model_flops=model_flops_per_token(model) * layout.tokens_per_step,
        executed_flops=_executed_flops_per_token(model, layout) * layout.tokens_per_step,
        peak_flops=device.peak_flops(layout.base_format),
    )


def model_flops_per_token(model: ModelSize) -> float:
    """6 N + 6 q L (s + 1): N weights that a token meets, attention over its own document."""
    h, matrices = model.hidden_size, model.num_ffn_matrices
    weights = model.num_layers * attention_parameters(model, 1) + h * model.vocab_size
    for layer in range(model.num_layers):
        if model.has_experts(layer):
            inner = model.topk * model.expert_ffn_size + model.shared_ffn_size
            weights += matrices * h * inner + h * model.num_experts
        else:
            weights += matrices * h * model.ffn_hidden_size
    attention = model.query_size * model.num_layers * (model.sequence_length + 1)
    return 6.0 * weights + 6.0 * attention


def _executed_flops_per_token(model: ModelSize, layout: Layout) -> float:
    flops = model_flops_per_token(model)
    if layout.recompute == "full":
        # All of forward but the output layer, a third of what it takes with backward.
        return flops + (flops - 6.0 * model.hidden_size * model.vocab_size) / 3
    if layout.recompute == "selective" and "core_attn" in layout.recompute_modules:
        return flops + 2.0 * model.query_size * model.num_layers * (model.sequence_length + 1)
    return flops
