"""One rank of the test run: a process that is sent functions and sends back what they return.

Started by `rank_pool.py`, one process a rank, kept for the whole run. Imports of torch and megatron
are paid once. Each call gets a process group of its own and leaves nothing behind: environment,
signal handlers, random state, torch's switches and megatron's globals are as before.
"""

import contextlib
import faulthandler
import gc
import importlib.util
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_KEPT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)


@dataclass(frozen=True, slots=True)
class Call:
    """One rank's part of `ranks.run`. `arguments` is pickled (args, kwargs)."""

    rank: int
    world_size: int
    store: Path
    timeout_seconds: float
    source: Path
    module: str
    qualified_name: str
    arguments: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call: a pickled result, or the text of an exception and when it was raised."""

    result: bytes = b""
    error: str = ""
    failed_at: float = 0.0


def serve(connection: Connection, *, has_megatron: bool, stack_file: Path) -> None:
    """Answer calls until the other side hangs up."""
    with stack_file.open("w") as stacks:
        faulthandler.enable(stacks)
        _import_once(has_megatron=has_megatron)
        connection.send(None)
        while True:
            try:
                call: Call = connection.recv()
            except EOFError:
                return
            # The stack is written by a thread that needs no interpreter lock.
            faulthandler.dump_traceback_later(call.timeout_seconds, file=stacks)
            with _left_as_found(has_megatron=has_megatron):
                answer = _answer(call)
            faulthandler.cancel_dump_traceback_later()
            connection.send(answer)


def _import_once(*, has_megatron: bool) -> None:
    import torch

    import megatron_ext.launch.process_group  # noqa: F401

    torch.set_num_threads(1)
    if has_megatron:
        from megatron_ext import cpu

        cpu.install()
        import megatron.core.models.gpt  # noqa: F401
    # What was imported stays; looking through it after each call would take longer than most calls.
    gc.collect()
    gc.freeze()


def _answer(call: Call) -> Answer:
    failed_at = 0.0
    try:
        function = _load_function(call)
        args, kwargs = pickle.loads(call.arguments)
        with _joined(call):
            try:
                result = function(*args, **kwargs)
            except BaseException:
                # Before the group is left: that makes the other ranks fail too.
                failed_at = time.monotonic()
                raise
        return Answer(result=pickle.dumps(result))
    except BaseException:
        return Answer(error=traceback.format_exc(), failed_at=failed_at or time.monotonic())


@contextlib.contextmanager
def _joined(call: Call) -> Iterator[None]:
    import torch

    from megatron_ext.launch.process_group import running
    from megatron_ext.launch.ranks import FileStoreAddress, RankInfo

    info = RankInfo(
        rank=call.rank,
        world_size=call.world_size,
        local_rank=call.rank,
        local_world_size=call.world_size,
        source="explicit",
        store=FileStoreAddress(call.store),
    )
    # Twice the call's time: what hangs shall be found waiting, not already failing.
    with running(info, device=torch.device("cpu"), timeout_seconds=2 * call.timeout_seconds):
        # A rank that raises and leaves while another still connects would hang that one.
        torch.distributed.barrier()
        yield
        if torch.distributed.is_initialized():
            torch.distributed.barrier()


def _load_function(call: Call) -> Callable[..., Any]:
    module = sys.modules.get(call.module) or _load_module(call)
    found: Any = module
    for name in call.qualified_name.split("."):
        found = getattr(found, name)
    function: Callable[..., Any] = found
    return function


def _load_module(call: Call) -> ModuleType:
    """By path, under the name it has in the test run: what pytest's importlib mode does too."""
    spec = importlib.util.spec_from_file_location(call.module, call.source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[call.module] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[call.module]
        raise
    return module


@contextlib.contextmanager
def _left_as_found(*, has_megatron: bool) -> Iterator[None]:
    import torch

    environment = dict(os.environ)
    folder = Path.cwd()
    handlers = {number: signal.getsignal(number) for number in _KEPT_SIGNALS}
    random.seed(0)
    torch.manual_seed(0)
    try:
        yield
    finally:
        if has_megatron:
            _forget_megatron()
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        # A model and its hooks refer to each other, and to process groups, three threads each.
        gc.collect()


def _forget_megatron() -> None:
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()


if __name__ == "__main__":
    # Imported under its own name, so that what is pickled here is known by it on both sides.
    sys.path[0] = str(ROOT)
    from megatron_ext.launch.child import die_with
    from tests import rank_worker

    die_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank_worker.serve(
        Connection(int(sys.argv[2])),
        has_megatron=sys.argv[3] == "megatron",
        stack_file=Path(sys.argv[4]),
    )
