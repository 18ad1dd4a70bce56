"""The parameters of the whole model, whatever ranks and stages they are spread over.

Each parameter has one global name (layers counted over all pipeline stages) and one whole shape;
a rank holds a block of it. From the name follow the random numbers a weight starts with, so a
model starts the same on any layout: "N ranks equal one rank" begins here.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_ext.mesh import Axis, Mesh

_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")
# Llama and megatron both start these smaller, so that the residual stream does not grow with depth.
_OUTPUT_PROJECTIONS = (
    "self_attention.linear_proj.weight",
    "mlp.linear_fc2.weight",
    "mlp.shared_experts.linear_fc2.weight",
    "mlp.experts.linear_fc2",
)


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """One parameter of one rank and where it stands in the whole.

    Attributes:
        name: global name, e.g. `decoder.layers.7.mlp.linear_fc1.weight`.
        parameter: this rank's block.
        dim: tensor dim that is spread over the ranks of `axis`, or None.
        num_blocks: 2 for fused gate and up, whose two halves are spread each on its own; else 1.
        axis: "expert" for the experts of a layer, which are spread over expert-parallel ranks;
            else "tensor". `Mesh.along` has its ranks.
    """

    name: str
    parameter: nn.Parameter
    dim: int | None
    num_blocks: int
    axis: Axis = "tensor"

    def whole_shape(self, size: int) -> tuple[int, ...]:
        """Its shape on one rank, from that on `size` ranks of the axis."""
        shape = list(self.parameter.shape)
        if self.dim is not None:
            shape[self.dim] *= size
        return tuple(shape)

    def cut(self, whole: Tensor, *, rank: int, size: int) -> Tensor:
        """The block of the whole tensor that belongs to one of `size` ranks of the axis."""
        if self.dim is None or size == 1:
            return whole
        halves = whole.chunk(self.num_blocks, dim=self.dim)
        parts = [half.chunk(size, dim=self.dim)[rank] for half in halves]
        return torch.cat(parts, dim=self.dim)

    def join(self, blocks: Sequence[Tensor]) -> Tensor:
        """The whole tensor from the blocks of all ranks of the axis, in their order."""
        if self.dim is None or len(blocks) == 1:
            return blocks[0]
        halves = [block.chunk(self.num_blocks, dim=self.dim) for block in blocks]
        return torch.cat([half[i] for i in range(self.num_blocks) for half in halves], dim=self.dim)


def axis_of(parameter: nn.Parameter) -> Axis:
    """Over whose ranks a parameter is spread; megatron's mark on experts tells."""
    return "tensor" if getattr(parameter, "allreduce", True) else "expert"


def parameter_shards(chunks: Sequence[nn.Module]) -> Iterator[ParameterShard]:
    """Every parameter of this rank's model chunks, with shared ones once."""
    for chunk in chunks:
        layer_numbers = {
            name: module.layer_number
            for name, module in chunk.named_modules()
            if isinstance(module, TransformerLayer)
        }
        for name, parameter in chunk.named_parameters():
            yield ParameterShard(
                name=(
                    # The last pipeline stage's copy of tied embeddings.
                    "embedding.word_embeddings.weight"
                    if getattr(parameter, "shared_embedding", False)
                    else _global_name(name, layer_numbers)
                ),
                parameter=parameter,
                dim=(
                    int(getattr(parameter, "partition_dim"))  # noqa: B009
                    if getattr(parameter, "tensor_model_parallel", False)
                    else None
                ),
                num_blocks=2 if name.endswith("linear_fc1.weight") else 1,
                axis=axis_of(parameter),
            )


def _global_name(name: str, layer_numbers: dict[str, int]) -> str:
    name = name.removeprefix("module.")
    match = _LAYER.search(name)
    if match is None:
        return name
    local_prefix = name[: match.end() - 1]
    for module_name, number in layer_numbers.items():
        if module_name.removeprefix("module.") == local_prefix:
            return f"{name[: match.start()]}.layers.{number - 1}.{name[match.end() :]}"
    return name


def init_parameters(
    chunks: Sequence[nn.Module], *, mesh: Mesh, seed: int, std: float, num_layers: int
) -> None:
    """Fill every weight from its own random stream; norms start at one.

    Normal(0, std), truncated nowhere; the two projections that write to the residual stream get
    std / sqrt(2 * num_layers) (GPT-2, section 2.3; megatron's `scaled_init_method`).
    """
    for shard in parameter_shards(chunks):
        with torch.no_grad():
            if shard.parameter.dim() == 1:
                shard.parameter.fill_(1.0)
                continue
            shard_std = std
            if shard.name.endswith(_OUTPUT_PROJECTIONS):
                shard_std = std / math.sqrt(2.0 * num_layers)
            ranks = mesh.along(shard.axis)
            if shard.axis == "expert":
                _fill_experts(shard, rank=ranks.rank, std=shard_std, seed=seed)
                continue
            # Tied weights stand on the first and last stage and must start as one.
            whole = _normal(
                shard.whole_shape(ranks.size), std=shard_std, seed=_stream(seed, shard.name)
            )
            shard.parameter.copy_(shard.cut(whole, rank=ranks.rank, size=ranks.size))


def _fill_experts(shard: ParameterShard, *, rank: int, std: float, seed: int) -> None:
    """Each expert from a stream of its own, so that no rank draws the numbers of all."""
    num_local = shard.parameter.shape[0]
    for local, expert in enumerate(shard.parameter):
        stream = _stream(seed, f"{shard.name}.{rank * num_local + local}")
        expert.copy_(_normal(tuple(expert.shape), std=std, seed=stream))


def _stream(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _normal(shape: tuple[int, ...], *, std: float, seed: int) -> Tensor:
    # The CPU's generator, so that a CPU run and a GPU run start from the same weights.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(
        0.0, std, generator=generator
    )
