"""Records with index tensors in them, moved to a device as a whole.

Many small copies would each cost microseconds and a launch, so all tensors go in one.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def moved(record: T, device: torch.device) -> T:
    """The same frozen dataclass, with all tensors in it (and in records and tuples in it) there.

    The tensors are one-dimensional and of one dtype.
    """
    tensors = list(_tensors(record))
    if not tensors:
        return record
    together = torch.cat(tensors).to(device, non_blocking=True)
    parts = torch.split(together, [len(tensor) for tensor in tensors])
    result: T = _replaced(record, iter(parts))
    return result


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple):
        for entry in x:
            yield from _tensors(entry)
    elif dataclasses.is_dataclass(x):
        for field in dataclasses.fields(x):
            yield from _tensors(getattr(x, field.name))


def _replaced(x: Any, parts: Iterator[Tensor]) -> Any:
    """x with its tensors replaced by the next parts, in the order of `_tensors`."""
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
