"""Bytes of one rank of each pipeline stage, before anything is started.

    weights      P w                  P: weights of the stage on this rank, w: bytes of one
    gradients    P g                  megatron's buffer: float32, or as the weights
    optimizer    P s / D              ZeRO-1 over D data-parallel ranks; s: 12 for Adam with bf16
                                      (float32 copy and two moments), 8 where weights are float32
    activations  T A_layer layers     T: tokens of a micro-batch, times micro-batches in flight

What a layer keeps of a token for backward, in elements (h hidden, q, kv query and key-value sizes
and f inner width after division by the tensor-parallel size t; hidden tensors are h / t with
sequence parallelism):

    two norms      2 h      their inputs (outputs of norms are the linear layers' inputs)
    linear layers  2 h      inputs of the first linear layers
    attention      q + kv   the product of qkv, of which values are a view
                   q + kv/2 rotated queries and keys
                   q        its result, the input of the projection
    SwiGLU         3 f      gate and up, and their product

In flight are p - stage micro-batches in 1F1B (Narayanan et al. 2021), interleaved 2 (p - stage - 1)
+ (v - 1) p + 1 chunks of layers / (p v). Recomputing whole layers keeps one hidden tensor a group
of layers, and one group whole while its backward pass runs.

Measured on CPU ranks: tests/megatron_ext/planning.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_ext.planning.layout import Layout, ModelSize
from megatron_ext.planning.parameters import stage_layers, stage_parameters

# Reciprocal root mean squares of two norms, and the sums of attention's heads are counted by head.
_NORM_BYTES = 8
# Ids, labels, weights and positions of a token, and its rotary table's row is shared by layers.
_TOKEN_BYTES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBytes:
    """Of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def to_dict(self) -> dict[str, int]:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return parts | {"total": self.total}


def stage_memory(
    model: ModelSize, layout: Layout, stage: int, *, fixed_bytes: int = 0
) -> MemoryBytes:
    """Of one rank of a stage.

    Args:
        fixed_bytes: what the device's runtime and communication libraries hold besides.
    """
    parameters = stage_parameters(model, layout, stage)
    data, expert_data = layout.data_size, layout.expert_data_size
    if layout.zero_stage == 0:
        data = expert_data = 1
    states = layout.state_bytes
    logits = _logits(model, layout) if stage == layout.pipeline_size - 1 else 0
    return MemoryBytes(
        weights=parameters.total * layout.weight_bytes,
        gradients=parameters.total * layout.grad_bytes,
        optimizer=parameters.dense * states // data + parameters.experts * states // expert_data,
        activations=_activations(model, layout, stage),
        logits=logits,
        # The loss is over when the backward pass of the layers begins.
        other=max(0, _working_set(model, layout) - logits) + _messages(model, layout) + fixed_bytes,
    )


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches of a stage whose activations are alive at once, in whole stages."""
    stages, chunks = layout.pipeline_size, layout.virtual_size
    if chunks == 1:
        return min(layout.num_micro_batches, stages - stage)
    most = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(layout.num_micro_batches * chunks, most) / chunks


def layer_token_bytes(model: ModelSize, layout: Layout, layer: int) -> float:
    """What one layer keeps of one token until its backward pass, nothing recomputed."""
    selective = layout.recompute_modules if layout.recompute == "selective" else ()
    tensor, hidden = layout.tensor_size, _hidden(model, layout)
    query, key_value = model.query_size / tensor, model.key_value_size / tensor
    elements = 2 * hidden + query + key_value + query
    kept = 2 * hidden
    if layout.number_format in ("fp8", "fp4"):
        # Attention's backward wants its result as it was, the projection's in few bits.
        kept += query
    # Recomputed, queries are kept as they were before they were turned; keys are views.
    elements += query if "core_attn" in selective else query + key_value / 2
    if model.has_qk_layernorm:
        elements += query
    if model.has_experts(layer):
        elements += _expert_elements(model, layout)
    elif "mlp" not in selective:
        elements += (model.num_ffn_matrices - 1) * model.ffn_hidden_size / tensor
        kept += model.ffn_hidden_size / tensor
    return elements * layout.weight_bytes + kept * _kept_bytes(layout) + _NORM_BYTES


def _kept_bytes(layout: Layout) -> float:
    """Of one element of what a linear layer keeps: codes, and scales of blocks."""
    return {"fp8": 1 + 1 / 32, "fp4": 0.5 + 1 / 16}.get(layout.number_format, layout.weight_bytes)


def _hidden(model: ModelSize, layout: Layout) -> float:
    """Elements of a token's hidden tensor on one rank."""
    return model.hidden_size / (layout.tensor_size if layout.sequence_parallel else 1)


def _expert_elements(model: ModelSize, layout: Layout) -> float:
    """Of one token in a layer with experts: rows in, gate and up, their product, rows out."""
    matrices = model.num_ffn_matrices
    # Tensor-parallel ranks share the tokens here.
    rows = model.topk / layout.tensor_size
    routed = rows * (2 * model.hidden_size + matrices * model.expert_ffn_size)
    shared = matrices * model.shared_ffn_size / layout.tensor_size
    return routed + shared + 2 * model.num_experts / layout.tensor_size


def _activations(model: ModelSize, layout: Layout, stage: int) -> int:
    tokens = layout.tokens_per_rank
    layers = stage_layers(model, layout, stage)
    whole = [layer_token_bytes(model, layout, layer) for layer in layers]
    alive = in_flight(layout, stage)
    ends = _TOKEN_BYTES * alive
    if stage == layout.pipeline_size - 1:
        # The last norm's input and output.
        ends += 2 * _hidden(model, layout) * layout.weight_bytes
    if layout.recompute == "selective" and "mlp" in layout.recompute_modules:
        ends += (
            model.num_ffn_matrices
            * model.ffn_hidden_size
            / layout.tensor_size
            * layout.weight_bytes
        )
    if layout.recompute != "full":
        return round(tokens * (alive * sum(whole) + ends))
    group = min(layout.recompute_num_layers, len(layers))
    kept = _hidden(model, layout) * layout.weight_bytes * -(-len(layers) // group)
    return round(tokens * (alive * kept + sum(sorted(whole)[-group:]) + ends))


def _logits(model: ModelSize, layout: Layout) -> int:
    """Logits that exist at once, the gradient of the last hidden tensor and of the weight."""
    tokens = layout.tokens_per_rank
    vocabulary = model.vocab_size // layout.tensor_size
    rows = tokens
    if layout.max_logit_bytes is not None:
        most = layout.max_logit_bytes // (vocabulary * layout.weight_bytes)
        rows = min(tokens, max(128, min(most, layout.max_logit_tokens) // 128 * 128))
    logits = rows * vocabulary * layout.weight_bytes
    num_chunks = -(-tokens // rows)
    weight = vocabulary * model.hidden_size * (layout.weight_bytes if num_chunks == 1 else 4)
    # The softmax of some of them in float32.
    block = min(rows * vocabulary * 4, layout.max_softmax_bytes)
    return logits + block + weight + tokens * model.hidden_size * layout.weight_bytes


def _working_set(model: ModelSize, layout: Layout) -> int:
    """Gradients that exist while the backward pass of one layer runs, and gathered tokens."""
    tensor = layout.tensor_size
    widest = 3 * model.ffn_hidden_size / tensor
    if any(model.moe_layers):
        widest = max(widest if not all(model.moe_layers) else 0.0, _expert_elements(model, layout))
    gathered = 2 * model.hidden_size if layout.sequence_parallel else 0
    elements = widest + 2 * _hidden(model, layout) + gathered
    quantised = 2 * model.ffn_hidden_size / tensor * layout.emulation_bytes
    return round(layout.tokens_per_rank * (elements * layout.weight_bytes + quantised))


def _messages(model: ModelSize, layout: Layout) -> int:
    """What neighbours in the pipeline send and are sent, for each chunk."""
    if layout.pipeline_size == 1:
        return 0
    elements = 2 * layout.virtual_size * _hidden(model, layout)
    return round(layout.tokens_per_rank * elements * layout.weight_bytes)
