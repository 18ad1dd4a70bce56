"""The tensors in a record, and records of index tensors moved to a device as a whole.

Many small copies would each cost microseconds and a launch, so all tensors go in one.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in lists, dicts and dataclasses, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, list | tuple | set | frozenset):
        for entry in value:
            yield from tensors_in(entry)


def moved(record: T, device: torch.device) -> T:
    """The same frozen dataclass, with all tensors in it (and in records and tuples in it) there.

    The tensors are one-dimensional and of one dtype.
    """
    tensors = list(tensors_in(record))
    if not tensors:
        return record
    together = torch.cat(tensors)
    if device.type == "cuda":
        # From other memory the copy would wait for what the device is at.
        together = together.pin_memory()
    together = together.to(device, non_blocking=True)
    parts = torch.split(together, [len(tensor) for tensor in tensors])
    result: T = _replaced(record, iter(parts))
    return result


def _replaced(x: Any, parts: Iterator[Tensor]) -> Any:
    """x with its tensors replaced by the next parts, in the order of `tensors_in`."""
    if isinstance(x, Tensor):
        return next(parts)
    if isinstance(x, tuple):
        return tuple(_replaced(entry, parts) for entry in x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        values = {
            field.name: _replaced(getattr(x, field.name), parts) for field in dataclasses.fields(x)
        }
        return dataclasses.replace(x, **values)
    return x
