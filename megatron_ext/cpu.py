"""The CPU as megatron-core's accelerator: idea 1, a CPU rank is a full rank.

megatron-core asks `torch.cuda` for its device, streams and random state and writes `device="cuda"`
in many places. `install()` answers all of that with the CPU, once, in this process:

* `torch.cuda.<name>` functions that megatron calls are replaced (table `_CUDA_FUNCTIONS`);
* a `TorchFunctionMode` rewrites `device="cuda"` (or a device index) to `cpu` in every torch call,
  and lets `Tensor.type()` say `torch.cuda.*`, which the distributed optimizer compares as text.

It is never installed by an import, and refuses where CUDA was already in use by this process.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda_device(device: object) -> bool:
    """True for "cuda", "cuda:3", torch.device("cuda") and a bare device index."""
    if isinstance(device, bool):
        return False
    if isinstance(device, int):
        return True
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class CpuAccelerator(TorchFunctionMode):
    """Sends every torch call that names a CUDA device to the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs:
            device = kwargs.get("device")
            if device is not None and _is_cuda_device(device):
                kwargs = {**kwargs, "device": _CPU}
            # Pinned memory needs a CUDA driver.
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to:
            args = tuple(_CPU if _names_cuda(arg) else arg for arg in args)
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        elif func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **kwargs)


def _names_cuda(arg: object) -> bool:
    return isinstance(arg, str | torch.device) and _is_cuda_device(arg)


class CpuStream:
    """A stream on a device that has only one: everything is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = _CPU

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        event = event or CpuEvent()
        event.record()
        return event


class CpuEvent:
    """An event that takes the time when it is recorded."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.seconds = 0.0

    def record(self, stream: object = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds from this event to `end`, as torch.cuda.Event gives them."""
        return (end.seconds - self.seconds) * 1e3

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _nothing(*args: object, **kwargs: object) -> Iterator[None]:
    yield


def _no_op(*args: object, **kwargs: object) -> None: ...


def _zero(*args: object, **kwargs: object) -> int:
    return 0


def _rng_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


_CUDA_FUNCTIONS: dict[str, Any] = {
    "current_device": lambda: _CPU,
    "device_count": lambda: 1,
    "set_device": _no_op,
    "synchronize": _no_op,
    "empty_cache": _no_op,
    "manual_seed": _manual_seed,
    "manual_seed_all": _manual_seed,
    "get_rng_state": _rng_state,
    "set_rng_state": _set_rng_state,
    "current_stream": CpuStream,
    "default_stream": CpuStream,
    "Stream": CpuStream,
    "Event": CpuEvent,
    "stream": _nothing,
    "device": _nothing,
    "memory_allocated": _zero,
    "max_memory_allocated": _zero,
    "memory_reserved": _zero,
    "max_memory_reserved": _zero,
    "reset_peak_memory_stats": _no_op,
}


def _own_object(replacement: Any) -> Any:
    """A function that stands under one name only: torch._dynamo keeps a table by identity."""
    if isinstance(replacement, type):
        return replacement
    return lambda *args, **kwargs: replacement(*args, **kwargs)


def is_installed() -> bool:
    """True once `install` has run in this process."""
    stream: object = torch.cuda.Stream
    return stream is CpuStream


def install() -> None:
    """Make megatron-core take the CPU for its accelerator in this process. Idempotent.

    Raises:
        RuntimeError: CUDA is already initialised here, so tensors may live on a GPU.
    """
    if is_installed():
        return
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "the CPU cannot stand in for CUDA in a process that already uses CUDA: "
            "call megatron_ext.cpu.install() before anything touches the GPU"
        )
    _import_megatron_without_compiler()
    for name, replacement in _CUDA_FUNCTIONS.items():
        setattr(torch.cuda, name, _own_object(replacement))
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _own_object(_no_op))
    torch.cuda.random.get_rng_state = _own_object(_rng_state)
    torch.cuda.random.set_rng_state = _own_object(_set_rng_state)
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    CpuAccelerator().__enter__()  # type: ignore[no-untyped-call]


def _not_compiled(function: Any = None, **options: object) -> Any:
    """What `torch.compile` is while megatron is imported: it returns the function as it stands."""
    return (lambda undecorated: undecorated) if function is None else function


def _import_megatron_without_compiler() -> None:
    """Import megatron-core with its fused functions left as plain torch.

    megatron decorates them with `torch.compile` when it is imported; on a CPU the first call of one
    would look for a C++ compiler, and the import alone loads torch._dynamo (seconds).
    """
    compile_function = torch.compile
    torch.compile = _not_compiled  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            # It says several times that Transformer Engine and Apex are absent.
            warnings.simplefilter("ignore")
            from megatron.core.tensor_parallel import random
    finally:
        torch.compile = compile_function
    # These two reach into torch._C, where no CUDA generator exists.
    random._get_cuda_rng_state = _rng_state
    random._set_cuda_rng_state = _set_rng_state
