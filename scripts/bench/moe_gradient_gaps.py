"""Steps of a model with experts on slow links, its gradients reduced at once or held for gaps.

    python -m scripts.bench.moe_gradient_gaps --link-megabits 200 --json FILE.json

Two hosts of one rank share experts and data; `shaped_hosts` makes the link (needs root). The same
steps run four times, by what happens to the gradients of the dense parts:

    behind    all reductions after the last micro-batch (no overlap)
    at once   megatron's overlap, its own bucket size
    buckets   megatron's overlap, buckets of the size that fits into a gap
    in gaps   the same buckets, held back (`parallel.grad_reduce_in_gaps`)

in turns, round by round. Losses must agree. Printed are medians of the slowest rank's time of
forward, backward and reduction.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench.hdp_measured import opened, write_definitions

NUM_RANKS = 2
OVERLAPPED = {"overlap_grad_reduce": True}
# The held run comes first: the next one takes its size of buckets.
RUNS: dict[str, dict[str, Any]] = {
    "in gaps": OVERLAPPED | {"grad_reduce_in_gaps": True},
    "buckets": OVERLAPPED,
    "at once": OVERLAPPED,
    "behind": {},
}
LOSS_TOLERANCE = 1e-5


def settings(corpus: Path, run_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A model whose dense parts have about as many weights as tokens have numbers."""
    return {
        "model": {
            "num_layers": options.layers,
            "hidden_size": options.hidden_size,
            "ffn_hidden_size": 2 * options.hidden_size,
            "num_attention_heads": 4,
        },
        "data": {
            "corpora": [{"path": str(corpus)}],
            "max_sequence_length": options.tokens,
            "tokens_per_rank": options.tokens,
        },
        "train": {"train_iters": 1000, "global_batch_tokens": NUM_RANKS * options.tokens},
        "optim": {"lr": 1e-4},
        "parallel": {"expert_model_parallel_size": 2, "use_distributed_optimizer": False},
        "moe": {
            "num_moe_experts": 8,
            "moe_ffn_hidden_size": options.expert_ffn,
            "moe_num_chunks": options.chunks,
        },
        "precision": {"dtype": "fp32"},
        "log": {"run_dir": str(run_dir)},
        "launch": {"device": "cpu"},
    }


def measured(tree: dict[str, Any], num_steps: int, num_rounds: int) -> dict[str, Any]:
    """Seconds and losses of all steps but the first two of each round, which warm up."""
    import torch
    import torch.distributed as dist

    from megatron_ext.step import run_micro_batches

    found: dict[str, Any] = {name: {"seconds": [], "losses": []} for name in RUNS}
    bucket_size = None
    for _ in range(num_rounds):
        for name, changes in RUNS.items():
            parallel = tree["parallel"] | changes
            if name == "buckets":
                parallel |= {"ddp_bucket_size": bucket_size}
            with opened(tree | {"parallel": parallel}, NUM_RANKS) as run:
                ddp = run.chunks[0]
                if name == "in gaps":
                    bucket_size = ddp.ddp_config.bucket_size
                found[name]["num_buckets"] = len(ddp.bucket_groups)
                for step in range(num_steps + 2):
                    batches = run.loader.take(is_last=False).batches
                    ddp.zero_grad_buffer()
                    run.balance.begin_step(step)
                    dist.barrier()
                    began = time.perf_counter()
                    loss = run_micro_batches(run.chunks, batches, reader=run.reader)
                    seconds = torch.tensor(time.perf_counter() - began)
                    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
                    if step >= 2:
                        found[name]["seconds"].append(float(seconds))
                        found[name]["losses"].append(loss.mean)
    return found | {"bucket_size": bucket_size}


def as_rank(folder: Path, options: argparse.Namespace) -> None:
    import torch

    from megatron_ext.config_file import check_tree
    from megatron_ext.launch import process_group
    from megatron_ext.launch.ranks import discover
    from megatron_ext.rank import choose_accelerator

    torch.set_num_threads(1)
    tree = json.loads((folder / "tree.json").read_text())
    info = discover()
    device = choose_accelerator(check_tree(tree, where="moe_gradient_gaps"))
    with process_group.running(info, device=device, timeout_seconds=300.0):
        report = measured(tree, options.steps, options.rounds)
    if info.rank == 0:
        (folder / "report.json").write_text(json.dumps(report))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--link-megabits", type=float, default=200.0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--expert-ffn", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank's micro-batch")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank is not None:
        as_rank(options.as_rank, options)
        return 0

    from megatron_ext.data.prepare import prepare
    from megatron_ext.data.settings import PrepareSettings
    from scripts.bench.shaped_hosts import run_linked

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_definitions(folder / "definitions.jsonl")
        prepare(
            PrepareSettings(
                inputs=(str(source),),
                output=folder / "corpus",
                tokenizer="bytes",
                validation_fraction=0.0,
            ),
            show_progress=False,
        )
        tree = settings(folder / "corpus", folder / "run", options)
        (folder / "tree.json").write_text(json.dumps(tree))
        module = [sys.executable, "-m", "scripts.bench.moe_gradient_gaps"]
        command = [*module, *sys.argv[1:], "--as-rank", name]
        if code := run_linked(command, NUM_RANKS, link_megabits=options.link_megabits):
            return code
        report = json.loads((folder / "report.json").read_text())
    print(f"buckets of {report['bucket_size']} elements (megatron's where none fits into a gap)")
    expected = report["behind"]["losses"]
    worst = 0.0
    for run in reversed(RUNS):
        row = report[run]
        worst = max(worst, *(abs(a / b - 1) for a, b in zip(row["losses"], expected, strict=True)))
        milliseconds = 1e3 * statistics.median(row["seconds"])
        print(f"{run:8} {milliseconds:8.0f} ms  {row['num_buckets']} buckets")
    if options.json:
        tree.pop("data")
        options.json.write_text(json.dumps({"settings": tree} | report, indent=1) + "\n")
    if worst > LOSS_TOLERANCE:
        print(f"error: losses differ by {worst:.1e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
