"""How many weights each pipeline stage holds, and what tensor parallelism leaves of them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.planning.layout import Layout, ModelSize


@dataclass(frozen=True, slots=True)
class StageParameters:
    """Weights of one rank of a stage: those every data-parallel rank has, and its experts."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


def stage_layers(model: ModelSize, layout: Layout, stage: int) -> list[int]:
    """Numbers of a stage's layers; interleaved, every chunk's."""
    chunks, stages = layout.virtual_size, layout.pipeline_size
    per_chunk = model.num_layers // (stages * chunks)
    return [
        (chunk * stages + stage) * per_chunk + index
        for chunk in range(chunks)
        for index in range(per_chunk)
    ]


def attention_parameters(model: ModelSize, tensor_size: int) -> int:
    """Of one layer on one rank: query, key, value and output."""
    return model.hidden_size * (2 * model.query_size + model.key_value_size) // tensor_size


def norm_parameters(model: ModelSize) -> int:
    """Of one layer; whole on every rank."""
    return 2 * model.hidden_size + (2 * model.kv_channels if model.has_qk_layernorm else 0)


def layer_parameters(model: ModelSize, layout: Layout, layer: int) -> StageParameters:
    """Of one layer on one rank."""
    tensor = layout.tensor_size
    dense = attention_parameters(model, tensor) + norm_parameters(model)
    matrices, h = model.num_ffn_matrices, model.hidden_size
    if not model.has_experts(layer):
        return StageParameters(dense + matrices * h * model.ffn_hidden_size // tensor, 0)
    dense += model.router_parameters + matrices * h * model.shared_ffn_size // tensor
    experts = matrices * h * model.expert_ffn_size * model.num_experts // layout.expert_size
    return StageParameters(dense, experts)


def stage_parameters(model: ModelSize, layout: Layout, stage: int) -> StageParameters:
    """Of one rank of a stage, embedding and output layer where they are."""
    layers = [
        layer_parameters(model, layout, layer) for layer in stage_layers(model, layout, stage)
    ]
    dense = sum(each.dense for each in layers)
    vocabulary = model.vocab_size * model.hidden_size // layout.tensor_size
    last = layout.pipeline_size - 1
    if stage == 0:
        dense += vocabulary
    if stage == last:
        dense += model.hidden_size
        # Tied weights are held twice where the ends of the pipeline are on different ranks.
        if not model.is_tied or last > 0:
            dense += vocabulary
    return StageParameters(dense, sum(each.experts for each in layers))


def num_parameters(model: ModelSize) -> int:
    """Of the whole model, tied weights once."""
    h, matrices = model.hidden_size, model.num_ffn_matrices
    total = model.num_layers * (attention_parameters(model, 1) + norm_parameters(model)) + h
    for layer in range(model.num_layers):
        if model.has_experts(layer):
            inner = model.shared_ffn_size + model.num_experts * model.expert_ffn_size
            total += model.router_parameters + matrices * h * inner
        else:
            total += matrices * h * model.ffn_hidden_size
    return total + model.vocab_size * h * (1 if model.is_tied else 2)
