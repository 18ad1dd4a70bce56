"""Kernels of the expert path beside plain torch: permutation, hash, means, grouped products.

    python scripts/bench/moe_kernels.py [--device cuda] [--shape 16384x2048x1408x64x6] [--json FILE]

A shape is TOKENSxHIDDENxFFNxEXPERTSxTOPK. `uniform` loads choose experts at random, `zipf` loads
the i-th with probability ~ 1/i. Each side is named; `ours` is what runs on this device.

Kernels that move rows are measured in GB/s: the bytes that must be read and written once, by the
time; the limit is the data sheet's memory speed and beside it a copy measured here. Products are
measured in TFLOP/s, 2 rows in_size out_size, against the data sheet (on a CPU: a measured product).
On a GPU times are medians of CUDA events with the L2 cache flushed in between; on a CPU medians of
calls, and there the figures say only that everything runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from moe.experts import grouped_linear, why_not_grouped_mm
from moe.lsh.hash import codes_of, draw_rotations, hash_rows
from moe.permutation import Permutation, order_by_expert, permute, unpermute
from moe.reference import permute_reference, unpermute_reference
from moe.segment_sum import segment_sum
from parallel.device import device_info, peak_or_measure
from scripts.bench.kernel_timing import copy_bytes_per_second, measure

CPU_SHAPES = ["512x256x128x8x2"]
# DeepSeekMoE 16B (64 fine-grained experts) and Mixtral 8x7B, one rank's micro-batch.
CUDA_SHAPES = ["16384x2048x1408x64x6", "8192x4096x14336x8x2"]
NUM_HASHES, HASH_DIM = 6, 16


@dataclass(frozen=True, slots=True)
class Side:
    """One way to do one thing: the call, and what it costs at least."""

    kernel: str
    name: str
    call: Callable[[], Any]
    num_bytes: int = 0
    flops: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """ratio: of the data sheet's (or measured) limit; copy_ratio: of a copy measured here."""

    kernel: str
    side: str
    shape: str
    load: str
    seconds: float
    gigabytes_per_second: float | None
    teraflops: float | None
    ratio: float | None
    copy_ratio: float | None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and FLOPs a second; None where there is no figure."""

    sheet_bytes: float | None
    copy_bytes: float
    flops: float | None


def choose_experts(num_tokens: int, num_experts: int, topk: int, load: str) -> Tensor:
    """int64 [num_tokens, topk], no expert twice for one token."""
    odds = torch.ones(num_experts)
    if load == "zipf":
        odds = 1.0 / torch.arange(1, num_experts + 1)
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(odds.expand(num_tokens, -1), topk, generator=generator)


def permutation_sides(tokens: Tensor, experts: Tensor, permutation: Permutation) -> Iterator[Side]:
    num_tokens, hidden_size = tokens.shape
    row_bytes = hidden_size * tokens.element_size()
    num_rows = experts.numel()
    rows = tokens[permutation.sources].requires_grad_()
    weights = torch.rand(experts.shape, device=tokens.device).requires_grad_()
    with_grad = tokens.clone().requires_grad_()
    grad_rows, grad_tokens = torch.randn_like(rows), torch.randn_like(tokens)

    # Each token is read once, whichever rows it becomes: the rest is in cache, at best.
    moved = (num_tokens + num_rows) * row_bytes
    yield Side("permute", "ours", lambda: permute(tokens, permutation), moved)
    yield Side("permute", "torch ops", lambda: permute_reference(tokens, experts), moved)
    yield Side("unpermute", "ours", lambda: unpermute(rows, weights, permutation), moved)
    yield Side("unpermute", "torch ops", lambda: unpermute_reference(rows, weights, experts), moved)
    # Rows are read too, for the gradient of the weights, and gradients of rows are written.
    both = (num_tokens + 2 * num_rows) * row_bytes
    inputs = [rows, weights]
    for name, output in (
        ("ours", unpermute(rows, weights, permutation)),
        ("torch ops", unpermute_reference(rows, weights, experts)),
    ):
        yield Side("unpermute backward", name, _backward(output, inputs, grad_tokens), both)
    for name, output in (
        ("ours", permute(with_grad, permutation)),
        ("torch ops", permute_reference(with_grad, experts)),
    ):
        yield Side("permute backward", name, _backward(output, [with_grad], grad_rows), moved)


def _backward(output: Tensor, inputs: list[Tensor], grad: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def cluster_sides(tokens: Tensor) -> Iterator[Side]:
    """Hash of every token; means of clusters of four rows each on average."""
    num_tokens, hidden_size = tokens.shape
    rotations = draw_rotations(hidden_size, num_hashes=NUM_HASHES, hash_dim=HASH_DIM, seed=0)
    rotations = rotations.to(tokens)
    row_bytes = hidden_size * tokens.element_size()
    flops = 2 * num_tokens * rotations.numel()

    def plain_hash() -> Tensor:
        projected = tokens @ rotations.flatten(0, 1).T
        return codes_of(projected.view(-1, NUM_HASHES, HASH_DIM))

    num_bytes = num_tokens * (row_bytes + 8)
    yield Side("hash", "ours", lambda: hash_rows(tokens, rotations), num_bytes, flops)
    yield Side("hash", "torch ops", plain_hash, num_bytes, flops)

    num_clusters = max(1, num_tokens // 4)
    of_row = torch.randint(num_clusters, (num_tokens,), device=tokens.device)
    order = of_row.argsort(stable=True)
    sizes = torch.bincount(of_row, minlength=num_clusters)
    starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    shares = sizes.clamp(min=1).float().reciprocal()[of_row][order]

    def plain_mean() -> Tensor:
        sums = torch.zeros(num_clusters, hidden_size, device=tokens.device, dtype=tokens.dtype)
        return sums.index_add_(0, of_row, tokens) / sizes.clamp(min=1)[:, None]

    moved = (num_tokens + num_clusters) * row_bytes
    yield Side("cluster mean", "ours", lambda: segment_sum(tokens, order, starts, shares), moved)
    yield Side("cluster mean", "torch ops", plain_mean, moved)


def product_sides(rows: Tensor, counts: Tensor, ffn_size: int) -> Iterator[Side]:
    """The first linear map of the experts: forward, and backward to rows and weights."""
    num_experts, hidden_size = counts.numel(), rows.shape[1]
    weight = torch.randn(num_experts, 2 * ffn_size, hidden_size, device=rows.device)
    weight = (0.02 * weight).to(rows.dtype).requires_grad_()
    rows = rows.detach().requires_grad_()
    flops = 2 * rows.numel() * 2 * ffn_size
    grad = torch.randn(rows.shape[0], 2 * ffn_size, device=rows.device).to(rows.dtype)
    backends = ["loop"] if why_not_grouped_mm(rows, weight) else ["loop", "torch"]
    for backend in backends:
        name = {"loop": "loop", "torch": "torch._grouped_mm"}[backend]

        def forward(backend: Any = backend) -> Tensor:
            return grouped_linear(rows, weight, counts, backend=backend)

        yield Side("grouped product", name, forward, flops=flops)
        back = _backward(forward(), [rows, weight], grad)
        yield Side("grouped product backward", name, back, flops=2 * flops)


def find_limits(device: str, dtype: torch.dtype, rounds: int) -> Limits:
    info = device_info(device)
    peak = peak_or_measure(dtype, device=device)
    return Limits(
        sheet_bytes=info.sheet.memory_bytes_per_second if info.sheet else None,
        copy_bytes=copy_bytes_per_second(device, rounds),
        flops=peak.flops_per_second if peak else None,
    )


def run_shape(
    shape: str, load: str, dtype: torch.dtype, device: str, rounds: int, limits: Limits
) -> Iterator[Result]:
    num_tokens, hidden_size, ffn_size, num_experts, topk = map(int, shape.split("x"))
    torch.manual_seed(0)
    tokens = torch.randn(num_tokens, hidden_size).to(dtype).to(device)
    experts = choose_experts(num_tokens, num_experts, topk, load).to(device)
    counts = torch.bincount(experts.reshape(-1), minlength=num_experts)
    permutation = order_by_expert(experts)
    rows = tokens[permutation.sources]
    sides = [
        *permutation_sides(tokens, experts, permutation),
        *(cluster_sides(tokens) if load == "uniform" else ()),
        *product_sides(rows, counts, ffn_size),
    ]
    for side in sides:
        seconds = measure(side.call, device, rounds)
        is_product = side.kernel.startswith("grouped")
        limit = limits.flops if is_product else limits.sheet_bytes
        speed = (side.flops if is_product else side.num_bytes) / seconds
        yield Result(
            kernel=side.kernel,
            side=side.name,
            shape=shape,
            load=load,
            seconds=seconds,
            gigabytes_per_second=side.num_bytes / seconds / 1e9 if side.num_bytes else None,
            teraflops=side.flops / seconds / 1e12 if side.flops else None,
            ratio=speed / limit if limit else None,
            copy_ratio=None if is_product else speed / limits.copy_bytes,
        )


def line(result: Result) -> str:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        f"{result.shape:<24} {result.load:<8} {result.kernel:<25} {result.side:<18}"
        f"{1e3 * result.seconds:>9.3f} ms {number(result.gigabytes_per_second, '.0f'):>6} GB/s"
        f" {number(result.teraflops, '.2f'):>8} TFLOP/s  of limit {number(result.ratio, '.2f'):>5}"
        f"  of copy {number(result.copy_ratio, '.2f'):>5}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_gpu else "cpu")
    parser.add_argument("--shape", action="append", help="TOKENSxHIDDENxFFNxEXPERTSxTOPK")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    limits = find_limits(device, dtype, arguments.rounds)
    found = []
    for shape in arguments.shape or (CUDA_SHAPES if device == "cuda" else CPU_SHAPES):
        for load in ("uniform", "zipf"):
            for result in run_shape(shape, load, dtype, device, arguments.rounds, limits):
                print(line(result), flush=True)
                found.append(asdict(result))
    report = {
        "date": date.today().isoformat(),
        "device": device_info(device).name,
        "host": platform.machine(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "limits": asdict(limits),
        "results": found,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
