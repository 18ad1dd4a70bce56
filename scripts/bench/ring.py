"""Attention over shared sequences against its limits: computation alone, communication alone.

    python scripts/bench/ring.py [--ranks 2] [--tokens-per-rank 4096] [--json FILE]
    python scripts/bench/ring.py --device cuda [--ranks 8] [--tokens-per-rank 8192]

On CPU ranks of one thread each, forward + backward of one layer is timed in turns

    ring            as it is
    compute         the same kernels, merges and copies, with nothing sent
    communication   the same messages and copies, with no kernel
    whole           the same sequences as whole documents on each rank alone, by `varlen_attention`;
                    its time is divided by the number of ranks

and printed are medians over rounds of the slowest rank's time, and of the ratio max(compute,
communication) / ring: how much of the shorter one is hidden. A block can hide only behind the
computation of the hop before it, not behind that of the last one; `hops / ring` has in its
numerator what this leaves,

    compute + sum over forward and backward of max(0, communication - computation of the hops)

`whole / ring` also counts what it costs to compute attention in pieces. With as many ranks as
cores, the threads that carry messages take time from those that compute: then not even a perfect
ring is faster than the sum of both. With `--link-megabits` each rank is a host behind a link of
that speed (`shaped_hosts`), slow enough that there is something to hide.

On one GPU there is nobody to talk to. There the blocks of all ranks are computed one rank after
the other, with nothing sent, against one flash call over the whole sequences.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from parallel.attention.block_choice import choose_blocks
from parallel.attention.shared_rows import shared_rows
from parallel.comm.exchange import Exchange
from parallel.device import device_info
from parallel.plan.rings import RowLayout
from scripts.bench.ring_sides import (
    BATCHES,
    NoKernels,
    Shape,
    SilentExchange,
    alone,
    batch_layouts,
    fill_buffers,
    hop_share,
    num_pairs,
    one_pass,
    whole_documents,
)


def as_rank(options: argparse.Namespace) -> None:
    """One CPU rank: times everything in turns; rank 0 writes the report."""
    import torch.distributed as dist

    from megatron_ext.launch import process_group
    from megatron_ext.launch.ranks import discover

    torch.set_num_threads(1)
    info = discover(os.environ)
    with process_group.running(info, device=torch.device("cpu"), timeout_seconds=300.0):
        records = [
            measure_on_ranks(name, shape, options, rank=dist.get_rank(), num_ranks=info.world_size)
            for shape in shapes(options)
            for name in BATCHES
        ]
        if dist.get_rank() == 0:
            (options.as_rank / "report.json").write_text(json.dumps(records))


def measure_on_ranks(
    name: str, shape: Shape, options: argparse.Namespace, *, rank: int, num_ranks: int
) -> dict[str, Any]:
    import torch.distributed as dist

    device = torch.device("cpu")
    layouts = batch_layouts(name, num_ranks=num_ranks, tokens_per_rank=options.tokens_per_rank)
    rows = shared_rows(layouts[rank], device=device)
    whole = whole_documents(layouts, device)
    kernels = choose_blocks(
        "auto",
        device_type="cpu",
        dtype=getattr(torch, shape.dtype),
        head_dim=shape.head_dim,
        softmax_scale=shape.head_dim**-0.5,
    )
    torch.manual_seed(rank)
    tensors = shape.tensors(rows.num_rows, "cpu")
    whole_tensors = shape.tensors(whole.num_rows, "cpu")
    exchange = Exchange(None)
    # The same buffers for all, so that they hold numbers that a real pass has left.
    silent = SilentExchange(None, exchange.traffic, exchange._buffers)
    nothing = NoKernels()
    sides: dict[str, Callable[[], None]] = {
        "ring": lambda: one_pass(rows, exchange, kernels, tensors),
        "compute": lambda: one_pass(rows, silent, kernels, tensors),
        "communication": lambda: one_pass(rows, exchange, nothing, tensors),
        "whole": lambda: alone(whole, whole_tensors),
    }
    before = exchange.traffic.num_bytes_sent
    sides["ring"]()
    num_bytes = exchange.traffic.num_bytes_sent - before
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds + 1):
        for side, run in sides.items():
            dist.barrier()
            began = time.perf_counter()
            run()
            took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if number:
                seconds[side].append(float(took) / (num_ranks if side == "whole" else 1))
    return report(name, shape, layouts, seconds) | {"bytes_sent_by_rank_0": num_bytes}


def report(
    name: str, shape: Shape, layouts: Sequence[RowLayout], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """Medians over rounds, and medians of the ratios within a round."""

    def ratio(over: Callable[[int], float]) -> float:
        return statistics.median(over(i) / ring for i, ring in enumerate(seconds["ring"]))

    # Forward 4 FLOPs a pair, channel and query head; backward 2.5 times that.
    flops = 3.5 * 4 * shape.num_heads * shape.head_dim * num_pairs(layouts)
    found: dict[str, Any] = {"batch": name, **asdict(shape)}
    found["num_ranks"] = len(layouts)
    found["tokens_per_rank"] = max(sum(p.num_tokens for p in x.pieces) for x in layouts)
    found |= {f"{side}_seconds": statistics.median(times) for side, times in seconds.items()}
    found["gflops_per_second_per_rank"] = flops / len(layouts) / found["ring_seconds"] / 1e9
    if "communication" in seconds:
        limit = [
            max(pair) for pair in zip(seconds["compute"], seconds["communication"], strict=True)
        ]
        found["limit_over_ring"] = ratio(lambda i: limit[i])
        hops = [
            hops_seconds(*pair, share=hop_share(layouts), dtype=shape.dtype)
            for pair in zip(seconds["compute"], seconds["communication"], strict=True)
        ]
        found["hops_over_ring"] = ratio(lambda i: hops[i])
    found["whole_over_ring"] = ratio(lambda i: seconds["whole"][i])
    return found


def hops_seconds(compute: float, communication: float, *, share: float, dtype: str) -> float:
    """The least that a ring can take; share: of the computation, during which blocks travel."""
    # Backward: 2.5 times the computation; keys and values again, and their float32 gradients.
    backward_bytes: float = 1 + 4 / getattr(torch, dtype).itemsize
    forward = max(0.0, communication / (1 + backward_bytes) - share * compute / 3.5)
    backward_sent = communication * backward_bytes / (1 + backward_bytes)
    return compute + forward + max(0.0, backward_sent - share * compute * 2.5 / 3.5)


def measure_on_gpu(name: str, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """The ring's blocks of all ranks one after the other, against one call over whole sequences."""
    device = torch.device("cuda")
    layouts = batch_layouts(name, num_ranks=options.ranks, tokens_per_rank=options.tokens_per_rank)
    all_rows = [shared_rows(layout, device=device) for layout in layouts]
    whole = whole_documents(layouts, device)
    kernels = choose_blocks(
        "auto",
        device_type="cuda",
        dtype=getattr(torch, shape.dtype),
        head_dim=shape.head_dim,
        softmax_scale=shape.head_dim**-0.5,
    )
    tensors = [shape.tensors(rows.num_rows, "cuda") for rows in all_rows]
    whole_tensors = shape.tensors(whole.num_rows, "cuda")
    silent = SilentExchange(None)
    for dtype in (getattr(torch, shape.dtype), torch.float32):
        fill_buffers(silent, dtype, all_rows, shape, device)

    def ring() -> None:
        for rows, mine in zip(all_rows, tensors, strict=True):
            one_pass(rows, silent, kernels, mine)

    sides: dict[str, Callable[[], None]] = {
        "ring": ring,
        "whole": lambda: alone(whole, whole_tensors),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds + 2):
        for side, run in sides.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if number > 1:
                seconds[side].append((time.perf_counter() - began) / options.ranks)
    return report(name, shape, layouts, seconds)


def shapes(options: argparse.Namespace) -> list[Shape]:
    return [
        Shape(options.heads, groups, options.head_dim, dtype)
        for dtype in options.dtypes
        for groups in options.groups
    ]


def print_table(records: Sequence[dict[str, Any]]) -> None:
    for record in records:
        times = ", ".join(
            f"{key.removesuffix('_seconds')} {1e3 * value:.1f}"
            for key, value in record.items()
            if key.endswith("_seconds")
        )
        ratios = ", ".join(
            f"{key.replace('_', ' ')} {record[key]:.3f}"
            for key in ("limit_over_ring", "hops_over_ring", "whole_over_ring")
            if key in record
        )
        print(
            f"{record['batch']}, {record['dtype']}, {record['num_heads']} heads in "
            f"{record['num_query_groups']} groups, {record['num_ranks']} x "
            f"{record['tokens_per_rank']} tokens: ms {times}; "
            f"{record['gflops_per_second_per_rank']:.1f} GFLOP/s a rank; {ratios}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens-per-rank", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--link-megabits", type=float, help="a host for each rank; needs root")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", help="float32 and bfloat16; on a GPU bfloat16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.dtypes is None:
        options.dtypes = ["float32", "bfloat16"] if options.device == "cpu" else ["bfloat16"]
    if options.as_rank is not None:
        as_rank(options)
        return 0
    if options.device == "cuda":
        device = device_info("cuda").name
        records = [
            measure_on_gpu(name, shape, options) for shape in shapes(options) for name in BATCHES
        ]
    else:
        from scripts.bench.shaped_hosts import run_linked

        device = device_info("cpu").name
        given = list(arguments if arguments is not None else sys.argv[1:])
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, *given, "--as-rank", folder]
            link = options.link_megabits
            if (code := run_linked(command, options.ranks, link_megabits=link)) != 0:
                return code
            records = json.loads((Path(folder) / "report.json").read_text())
    print_table(records)
    if options.json:
        tree = {
            "date": str(date.today()),
            "device": device,
            "torch": torch.__version__,
            "rounds": options.rounds,
            "link_megabits": options.link_megabits,
            "results": records,
        }
        options.json.write_text(json.dumps(tree, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
