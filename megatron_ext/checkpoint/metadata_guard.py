"""The one pickle of a `torch_dist` checkpoint, read with nothing allowed but its own records.

torch and megatron unpickle `.metadata` without limits, so a prepared file could run any command.
Before they see it, it is read here by an unpickler that knows only the classes a checkpoint uses.
Records of pickled objects (`BytesStorageMetadata`) are not among them: ours hold tensors only, and
torch unpickles such objects without limits, wherever a file says that a weight is one.
"""

from __future__ import annotations

import os
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

_ALLOWED = {
    "builtins": {"set", "frozenset", "list", "dict", "tuple", "slice", "complex"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "_codecs": {"encode"},
    "torch": {
        "Size",
        "device",
        "dtype",
        "bfloat16",
        "float16",
        "float32",
        "float64",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "bool",
        "float8_e4m3fn",
        "float8_e5m2",
    },
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}


def _enum_member(owner: Any, name: Any) -> Any:
    """Stands for `getattr`, by which Python 3.11.0 to 3.11.3 write members of an enum."""
    if isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"it asks for getattr({owner!r}, {name!r})")


class _CheckpointUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def check_metadata(checkpoint: Path) -> None:
    """Refuse a `.metadata` that holds anything but checkpoint records.

    Raises:
        UserError: it is missing, damaged, or would load something else.
    """
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        raise UserError(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, so torch would run code from checkpoints; "
            "unset it"
        )
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as stream:
            _CheckpointUnpickler(stream).load()
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so this is not a complete checkpoint") from None
    except Exception as error:
        raise UserError(
            f"{path}: refused, because it is not plain checkpoint metadata ({error}); "
            "do not load checkpoints from people you do not trust"
        ) from None
