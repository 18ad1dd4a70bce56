"""Seconds of one micro-batch in one layer, in one direction, on one rank of T tokens.

    products    2 m n k / (P e m/(m+d) n/(n+d) k/(k+d))   e, d: what large and small ones attain
    attention   4 q (s + 1) / 2 T / (P e_att)             causal pairs of documents of s tokens
    memory      bytes that norms, rotation, activation and residual sums touch / B
    tensor      two gathers and two scatters of T h b (t - 1) / t, of which a share is hidden
    experts     two all-to-alls: a row goes once to each node (rank, within a node) that it needs
    overhead    kernels that must be launched, whatever they compute

Backward is twice forward for products and memory, 2.5 times for attention (flash attention computes
the scores again), once for communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import comb

from megatron_ext.planning.device_profile import DeviceProfile, NumberFormat
from megatron_ext.planning.layout import Layout, ModelSize

_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Seconds."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    experts: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def __add__(self, other: Work) -> Work:
        return Work(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(self)
            }
        )

    def __mul__(self, factor: float) -> Work:
        return Work(**{field.name: getattr(self, field.name) * factor for field in fields(self)})

    def backward(self) -> Work:
        return Work(
            products=2 * self.products,
            attention=_ATTENTION_BACKWARD * self.attention,
            memory=2 * self.memory,
            tensor=self.tensor,
            experts=self.experts,
            overhead=self.overhead,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """count products of [rows, inner] and [inner, columns]."""

    rows: float
    columns: float
    inner: float
    count: float = 1.0

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.inner * self.count


def layer_forward(
    model: ModelSize, layout: Layout, device: DeviceProfile, *, has_experts: bool
) -> Work:
    """One layer."""
    products = [
        *attention_products(model, layout),
        *feed_forward_products(model, layout, has_experts=has_experts),
    ]
    quantised = 0.0
    if layout.number_format in ("fp8", "fp4"):
        # Read once in bf16, written in few bits along rows and along columns.
        quantised = sum(3.5 * each.rows * each.inner * each.count for each in products)
    return Work(
        products=sum(
            _product_seconds(device, each, number_format=layout.number_format) for each in products
        ),
        attention=_attention(model, layout, device),
        memory=device.memory_seconds(_touched(model, layout, has_experts=has_experts) + quantised),
        tensor=_tensor(model, layout, device, has_experts=has_experts),
        experts=_exchange(model, layout, device) if has_experts else 0.0,
        overhead=_overhead(model, layout, device, has_experts=has_experts),
    )


def layer_recomputed(
    model: ModelSize, layout: Layout, device: DeviceProfile, *, has_experts: bool
) -> Work:
    """What backward computes again of one layer."""
    if layout.recompute == "none":
        return Work()
    if layout.recompute == "full":
        return layer_forward(model, layout, device, has_experts=has_experts)
    work = Work()
    if "core_attn" in layout.recompute_modules:
        work += Work(attention=_attention(model, layout, device))
    if "mlp" in layout.recompute_modules and not has_experts:
        again = feed_forward_products(model, layout, has_experts=False)
        seconds = sum(
            _product_seconds(device, each, number_format=layout.number_format) for each in again
        )
        work += Work(products=seconds)
    return work


def output_forward(model: ModelSize, layout: Layout, device: DeviceProfile) -> Work:
    """The output layer and the loss."""
    tokens, columns = layout.tokens_per_rank, model.vocab_size / layout.tensor_size
    product = Product(rows=tokens, columns=columns, inner=model.hidden_size)
    # Logits are written, read for the loss and overwritten by their gradient.
    touched = tokens * columns * (2 * layout.weight_bytes + 4)
    gathered = tokens * model.hidden_size * layout.weight_bytes
    return Work(
        products=_product_seconds(device, product, number_format=layout.base_format),
        memory=device.memory_seconds(touched),
        tensor=_collective(layout, device, gathered, num_messages=2) if _is_split(layout) else 0.0,
    )


def attention_products(model: ModelSize, layout: Layout) -> Iterator[Product]:
    tokens, tensor = layout.tokens_per_rank, layout.tensor_size
    into = (model.query_size + model.key_value_size) / tensor
    yield Product(rows=tokens, columns=into, inner=model.hidden_size)
    yield Product(rows=tokens, columns=model.hidden_size, inner=model.query_size / tensor)


def feed_forward_products(
    model: ModelSize, layout: Layout, *, has_experts: bool
) -> Iterator[Product]:
    tokens, tensor, h = layout.tokens_per_rank, layout.tensor_size, model.hidden_size
    first = model.num_ffn_matrices - 1
    if not has_experts:
        inner = model.ffn_hidden_size / tensor
        yield Product(rows=tokens, columns=first * inner, inner=h)
        yield Product(rows=tokens, columns=h, inner=inner)
        return
    local = model.num_experts / layout.expert_size
    # Tokens of all ranks of the expert group meet its experts: as many rows as each rank sends.
    rows = max(1.0, tokens / tensor * model.topk / local)
    width = model.expert_ffn_size
    yield Product(rows=tokens / tensor, columns=model.num_experts, inner=h)
    yield Product(rows=rows, columns=first * width, inner=h, count=local)
    yield Product(rows=rows, columns=h, inner=width, count=local)
    if model.shared_ffn_size:
        shared = model.shared_ffn_size / tensor
        yield Product(rows=tokens, columns=first * shared, inner=h)
        yield Product(rows=tokens, columns=h, inner=shared)


def _product_seconds(
    device: DeviceProfile, product: Product, *, number_format: NumberFormat
) -> float:
    seconds = device.gemm_seconds(
        product.rows, product.columns, product.inner, number_format=number_format
    )
    return product.count * seconds


def _attention(model: ModelSize, layout: Layout, device: DeviceProfile) -> float:
    pairs = layout.tokens_per_rank * (model.sequence_length + 1) / 2
    flops = 4.0 * pairs * model.query_size / layout.tensor_size
    return flops / (device.peak_flops(layout.base_format) * device.attention_efficiency)


def _touched(model: ModelSize, layout: Layout, *, has_experts: bool) -> float:
    """Bytes, forward: norms read and write, residual sums read two and write one."""
    tensor = layout.tensor_size
    hidden = model.hidden_size / (tensor if layout.sequence_parallel else 1)
    elements = 2 * 2 * hidden + 2 * 3 * hidden
    elements += 2 * (model.query_size + model.key_value_size / 2) / tensor
    if has_experts:
        rows = model.topk / tensor
        # Permuted, exchanged, put back and summed.
        elements += rows * (6 * model.hidden_size + model.num_ffn_matrices * model.expert_ffn_size)
        elements += model.num_ffn_matrices * model.shared_ffn_size / tensor
    else:
        elements += model.num_ffn_matrices * model.ffn_hidden_size / tensor
    return layout.tokens_per_rank * elements * layout.weight_bytes


def _overhead(
    model: ModelSize, layout: Layout, device: DeviceProfile, *, has_experts: bool
) -> float:
    microseconds = device.layer_microseconds
    if has_experts:
        rows = layout.tokens_per_rank / layout.tensor_size * model.topk
        microseconds += device.expert_microseconds + rows * device.expert_row_nanoseconds * 1e-3
    return microseconds * 1e-6


def _is_split(layout: Layout) -> bool:
    return layout.tensor_size > 1


def _tensor(model: ModelSize, layout: Layout, device: DeviceProfile, *, has_experts: bool) -> float:
    if not _is_split(layout):
        return 0.0
    # Experts take the tokens as sequence parallelism has spread them; what is shared does not.
    passes = 2 if has_experts and not model.shared_ffn_size else 4
    num_bytes = layout.tokens_per_rank * model.hidden_size * layout.weight_bytes
    seconds = passes * _collective(layout, device, num_bytes, num_messages=layout.tensor_size - 1)
    return seconds * (1.0 - device.tensor_overlap)


def _collective(
    layout: Layout, device: DeviceProfile, num_bytes: float, *, num_messages: float
) -> float:
    """A gather or scatter of num_bytes over the tensor-parallel ranks."""
    share = (layout.tensor_size - 1) / layout.tensor_size
    return device.link(layout.tensor_size).seconds(num_bytes * share, num_messages=num_messages)


def _exchange(model: ModelSize, layout: Layout, device: DeviceProfile) -> float:
    """Dispatch and combine, what does not hide; hierarchical where the group spans nodes."""
    size = layout.expert_size
    if size == 1:
        return 0.0
    row_bytes = layout.tokens_per_rank / layout.tensor_size * model.hidden_size
    row_bytes *= layout.weight_bytes
    inside = min(size, device.links[-2].max_ranks or size) if len(device.links) > 1 else size
    seconds = device.link(inside).seconds(
        row_bytes * _copies(model, size) * (inside - 1) / inside, num_messages=inside - 1
    )
    if size > inside:
        nodes = size // inside
        seconds += device.link(size).seconds(
            row_bytes * _copies(model, nodes) * (nodes - 1) / nodes, num_messages=nodes - 1
        )
    return 2 * seconds * (1 - layout.expert_overlap)


def _copies(model: ModelSize, num_groups: int) -> float:
    """Of num_groups groups of experts, how many a token needs: topk experts drawn evenly."""
    outside = model.num_experts - model.num_experts // num_groups
    missed = comb(outside, model.topk) / comb(model.num_experts, model.topk)
    return num_groups * (1.0 - missed)
