"""Time and peak memory of linear + cross entropy, forward + backward, beside plain torch.

    python scripts/bench/cross_entropy.py [--device cuda] [--shape 2048x512x32000] [--json FILE]

| side       | what it is                                                                        |
|------------|-----------------------------------------------------------------------------------|
| `torch`    | F.linear, logits.float(), F.cross_entropy: what one would write                    |
| `torch_16` | the same without the float32 copy of the logits (equal to `torch` in float32)      |
| `chunked`  | linear_cross_entropy: Triton kernels on a GPU, torch on a CPU                      |
| `recompute`| chunks under torch.utils.checkpoint: logits computed again in backward             |

A shape is TOKENSxHIDDENxVOCAB. Sides take turns, round by round; the figures are medians and the
smallest time. Peak memory comes on top of the inputs, gradients included: on a GPU what the
allocator handed out, on a CPU the growth of the resident set in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_ext.linear_cross_entropy import linear_cross_entropy

Side = Callable[[Tensor, Tensor, Tensor], Tensor]

CPU_SHAPES = ["2048x512x32000", "4096x256x4096"]
# Output layers of 8B and 70B models with Llama 3's vocabulary, the second on one of 8 ranks.
CUDA_SHAPES = ["8192x4096x128256", "32768x8192x16032"]
CHECKPOINT_TOKENS = {"cpu": 1024, "cuda": 2048}


def torch_side(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits.float(), labels, reduction="sum")


def torch_16_side(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits, labels, reduction="sum")


def chunked_side(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    group = dist.group.WORLD
    assert group is not None
    return linear_cross_entropy(hidden, weight, labels, group=group)[0]


def recompute_side(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    size = CHECKPOINT_TOKENS[hidden.device.type]
    loss = hidden.new_zeros((), dtype=torch.float32)
    for rows in range(0, len(hidden), size):
        part = slice(rows, rows + size)
        loss = loss + checkpoint(
            torch_side, hidden[part], weight, labels[part], use_reentrant=False
        )
    return loss


SIDES: dict[str, Side] = {
    "torch": torch_side,
    "torch_16": torch_16_side,
    "chunked": chunked_side,
    "recompute": recompute_side,
}


def make_inputs(shape: str, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, hidden_size, vocab_size = map(int, shape.split("x"))
    torch.manual_seed(0)
    kind: Any = {"dtype": getattr(torch, dtype), "device": device, "requires_grad": True}
    hidden = torch.randn(num_tokens, hidden_size, **kind)
    weight = (torch.randn(vocab_size, hidden_size, **kind) * 0.02).detach().requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (num_tokens,), device=device)


def run_once(side: Side, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """One forward + backward; seconds."""
    hidden, weight, _ = inputs
    hidden.grad = weight.grad = None
    is_cuda = hidden.is_cuda
    if is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    torch.autograd.backward(side(*inputs))
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def time_sides(shape: str, dtype: str, device: str, rounds: int) -> dict[str, dict[str, float]]:
    inputs = make_inputs(shape, dtype, device)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for name, side in SIDES.items():
        try:
            run_once(side, inputs)
        except torch.OutOfMemoryError:
            del seconds[name]
    for _ in range(rounds):
        for name, times in seconds.items():
            times.append(run_once(SIDES[name], inputs))
    return {
        name: {"median_seconds": statistics.median(times), "min_seconds": min(times)}
        for name, times in seconds.items()
    }


def peak_bytes_cuda(name: str, shape: str, dtype: str) -> int:
    inputs = make_inputs(shape, dtype, "cuda")
    run_once(SIDES[name], inputs)
    inputs[0].grad = inputs[1].grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_once(SIDES[name], inputs)
    return torch.cuda.max_memory_allocated() - before


def peak_bytes_cpu(connection: Any, name: str, shape: str, dtype: str) -> None:
    """In a process of its own: how much the resident set grows, sampled each millisecond."""
    torch.set_num_threads(1)
    open_group()
    inputs = make_inputs(shape, dtype, "cpu")
    # What libraries allocate once, and threads' stacks, are not the loss's.
    small = tuple(x[:64].detach() for x in inputs[:2])
    run_once(
        SIDES[name], (small[0].requires_grad_(), small[1].requires_grad_(), inputs[2][:64] % 64)
    )
    done, peak, before = threading.Event(), 0, resident_bytes()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_bytes())
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    run_once(SIDES[name], inputs)
    done.set()
    sampler.join()
    connection.send(peak - before)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(name: str, shape: str, dtype: str, device: str) -> int:
    if device == "cuda":
        return peak_bytes_cuda(name, shape, dtype)
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=peak_bytes_cpu, args=(other, name, shape, dtype))
    process.start()
    found = int(connection.recv())
    process.join()
    return found


def open_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", action="append", help="TOKENSxHIDDENxVOCAB; may be repeated")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    open_group()
    results = []
    shapes = arguments.shape or (CUDA_SHAPES if device == "cuda" else CPU_SHAPES)
    dtypes = arguments.dtype or (["bfloat16"] if device == "cuda" else ["float32", "bfloat16"])
    for shape in shapes:
        for dtype in dtypes:
            times = time_sides(shape, dtype, device, arguments.rounds)
            for name, figures in times.items():
                figures["peak_bytes"] = peak_bytes(name, shape, dtype, device)
                print(
                    f"{shape} {dtype:>8} {name:>9}: median {figures['median_seconds'] * 1e3:8.1f} "
                    f"ms, least {figures['min_seconds'] * 1e3:8.1f} ms, peak "
                    f"{figures['peak_bytes'] / 2**20:7.0f} MiB",
                    flush=True,
                )
            results.append({"shape": shape, "dtype": dtype, "sides": times})
    if arguments.json:
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
        report = {"date": str(date.today()), "device": name, "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
