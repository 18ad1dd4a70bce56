"""What a checkpoint holds, as megatron's sharded tensors.

Weights and optimizer state have the name and whole shape of the parameter they belong to, whatever
layout wrote them, so any layout can read them. megatron 0.16.1's own `fully_reshardable` optimizer
format does the same but loses elements with more than one gradient bucket; here each parameter is
gathered by itself, and the data-parallel ranks take turns in writing them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn

from megatron_ext.mesh import Mesh, Ranks
from megatron_ext.model import unwrap
from megatron_ext.optimizer import STATE_NAMES, main_parameter
from megatron_ext.parameters import axis_of

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


def model_state(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Sharded weights of this rank's chunks, keyed so that chunks do not overwrite each other."""
    state: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        for name, entry in unwrap(chunk).sharded_state_dict().items():
            # Empty pickled objects that megatron keeps for Transformer Engine.
            if not isinstance(entry, ShardedObject):
                state[f"{index}.{name}"] = entry
    return state


def _parts_and_parameters(
    chunks: Sequence[nn.Module], optimizer: ChainedOptimizer
) -> Iterator[tuple[Any, nn.Parameter, Sharded]]:
    """(optimizer part, parameter, its sharding) in an order that is the same on all DP ranks."""
    sharding = {
        id(entry.data): entry
        for chunk in chunks
        for entry in nested_values(unwrap(chunk).sharded_state_dict())
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    for chunk in chunks:
        for parameter in chunk.parameters():
            if id(parameter) in sharding:
                # megatron chains one optimizer, and a second for the experts where there are any.
                part = optimizer.chained_optimizers[axis_of(parameter) == "expert"]
                yield part, parameter, sharding[id(parameter)]


def optimizer_state_to_save(
    chunks: Sequence[nn.Module], optimizer: ChainedOptimizer, *, rule: str, mesh: Mesh
) -> dict[str, Sharded]:
    """Whole optimizer tensors of the parameters that this data-parallel rank writes."""
    state: dict[str, Sharded] = {}
    for index, (part, parameter, sharding) in enumerate(_parts_and_parameters(chunks, optimizer)):
        replicas = mesh.replicas(axis_of(parameter))
        writer = index % replicas.size
        for name in ("param", *STATE_NAMES[rule]):
            if name == "param" and not _has_own_main(part, parameter):
                continue
            whole = _gather_whole(part, parameter, name, writer=writer, replicas=replicas)
            if whole is not None:
                state[f"{name}.{index}"] = _like(sharding, name, whole, is_main=True)
    return state


def optimizer_state_to_load(
    chunks: Sequence[nn.Module], optimizer: ChainedOptimizer, *, rule: str, with_main: bool
) -> dict[str, Sharded]:
    """Empty tensors for `dist_checkpointing.load` to fill, whole on every data-parallel rank."""
    state: dict[str, Sharded] = {}
    for index, (_, parameter, sharding) in enumerate(_parts_and_parameters(chunks, optimizer)):
        for name in ("param", *STATE_NAMES[rule]):
            if name != "param" or with_main:
                empty = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                state[f"{name}.{index}"] = _like(sharding, name, empty, is_main=False)
    return state


def put_optimizer_state(
    loaded: dict[str, Tensor],
    chunks: Sequence[nn.Module],
    optimizer: ChainedOptimizer,
    *,
    rule: str,
    num_updates: int,
) -> None:
    """Cut this rank's ranges out of the loaded tensors into the optimizer."""
    optimizer.reload_model_params()
    for index, (part, parameter, _) in enumerate(_parts_and_parameters(chunks, optimizer)):
        held = main_parameter(part, parameter)
        if held is None:
            continue
        main, span = held
        main_from_file = loaded.get(f"param.{index}")
        if main_from_file is not None:
            # A float32 run that goes on from a bf16 one takes these too: they are the weights.
            _copy_flat(main, main_from_file, span)
            if not _has_own_main(part, parameter):
                _copy_flat(parameter, main_from_file, slice(None))
        entry = part.optimizer.state[main]
        for name in STATE_NAMES[rule]:
            entry[name] = torch.empty_like(main, requires_grad=False)
            _copy_flat(entry[name], loaded[f"{name}.{index}"], span)
        if rule == "adam":
            # AdamW's bias correction counts updates in a float tensor of each parameter.
            entry["step"] = torch.tensor(
                float(num_updates), dtype=torch.float32, device=main.device
            )


def num_updates(optimizer: ChainedOptimizer) -> int:
    """Updates that Adam has made, for its bias correction; 0 for an optimizer that counts none."""
    for part in optimizer.chained_optimizers:
        for entry in part.optimizer.state.values():
            if "step" in entry:
                return int(entry["step"])
    return 0


def _has_own_main(part: Any, parameter: nn.Parameter) -> bool:
    return parameter.dtype != torch.float32


def _copy_flat(target: Tensor, whole: Tensor, span: slice) -> None:
    with torch.no_grad():
        target.view(-1).copy_(whole.reshape(-1)[span])


def _gather_whole(
    part: Any, parameter: nn.Parameter, name: str, *, writer: int, replicas: Ranks
) -> Tensor | None:
    """One optimizer tensor of one parameter, whole (float32, on the CPU) on rank `writer`."""
    held = main_parameter(part, parameter)
    local = None
    if held is not None:
        main, span = held
        local = main if name == "param" else part.optimizer.state[main].get(name)
        if local is None:
            # No update yet, so the optimizer has not made this tensor.
            local = torch.zeros_like(main)
    is_spread = hasattr(part, "model_param_group_index_map") and replicas.size > 1
    if not is_spread:
        if replicas.rank != writer:
            return None
        assert local is not None
        return local.detach().float().reshape(parameter.shape).cpu()
    # Ranges do not overlap, so a sum of bit patterns puts them side by side exactly.
    bits = torch.zeros(parameter.numel(), dtype=torch.int32, device=parameter.device)
    if local is not None:
        bits[span] = local.detach().float().reshape(-1).view(torch.int32)
    group_rank = dist.get_global_rank(replicas.group, writer)
    dist.reduce(bits, dst=group_rank, group=replicas.group)
    if replicas.rank != writer:
        return None
    return bits.view(torch.float32).reshape(parameter.shape).cpu()


def _like(sharding: Sharded, name: str, data: Tensor, *, is_main: bool) -> Sharded:
    """Sharded tensor of an optimizer tensor: the parameter's sharding under its own key."""
    # The last entry numbers data-parallel replicas. Weights are written by replica 0; here the
    # rank that holds the tensor is the only one and takes that place. Tied embeddings stay marked
    # as copies by the first entry.
    replica = sharding.replica_id
    assert isinstance(replica, tuple)
    replica_id = (*replica[:-1], 0 if is_main else replica[-1])
    key = f"optimizer.state.{name}.{sharding.key}"
    if isinstance(sharding, ShardedTensorFactory):
        return replace(sharding, key=key, data=data, replica_id=replica_id)
    return replace(sharding, key=key, data=data, dtype=data.dtype, replica_id=replica_id)


def rng_state(mesh: Mesh) -> dict[str, ShardedTensor]:
    """Every random state of every rank, as bytes: row r belongs to rank r."""
    python_state = random.getstate()
    numpy_state = np.random.get_state(legacy=True)
    words = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python_state[1], dtype=torch.int64).view(torch.uint8),
        "numpy": torch.from_numpy(
            np.concatenate([numpy_state[1].astype(np.int64), [numpy_state[2]]])  # type: ignore[index]
        ).view(torch.uint8),
        "device": torch.cuda.get_rng_state().cpu(),
    }
    for name, state in get_cuda_rng_tracker().get_states().items():
        words[f"tracker.{name}"] = state.cpu()
    return {
        f"rng.{name}": ShardedTensor.from_rank_offsets(
            f"rng.{name}", value.reshape(1, -1), (0, mesh.rank, mesh.world_size)
        )
        for name, value in words.items()
    }


def set_rng_state(loaded: dict[str, Tensor]) -> None:
    """Put back what `rng_state` described."""
    rows = {name.removeprefix("rng."): value.reshape(-1) for name, value in loaded.items()}
    torch.set_rng_state(rows["torch"])
    words = rows["python"].view(torch.int64).tolist()
    random.setstate((3, tuple(words), None))
    numpy_words = rows["numpy"].view(torch.int64).numpy()
    np.random.set_state(
        ("MT19937", numpy_words[:-1].astype(np.uint32), int(numpy_words[-1]), 0, 0.0)
    )
    torch.cuda.set_rng_state(rows["device"])
    tracker = get_cuda_rng_tracker()
    tracker.set_states(
        {
            name.removeprefix("tracker."): value
            for name, value in rows.items()
            if name.startswith("tracker.")
        }
    )
