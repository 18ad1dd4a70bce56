"""Step time of the planners on real text with its real lengths, on two CPU ranks of one thread.

    python scripts/bench/hdp_measured.py [--ranks 2] [--steps 6] [--link-megabits 100] [--json FILE]

The text is the standard library's source, byte by byte, a function or method a document: most are
short, some are longer than a rank holds. One run of ranks does everything: it measures the cost
model (`megatron-ext profile`), then takes the same global batches through the plans of hdp,
static_cp and megatron-core's scheduler in turns, forward, backward and reduction of gradients, on
the same weights; losses must agree. Printed are medians over steps, ratios step by step, and what
the cost model predicted of these ratios. After that each planner trains on its own from the same
start, and the three loss curves are compared.

Loopback between two cores is, for its FLOPs, far faster than any network between GPUs. With
`--link-megabits` each rank is a host of its own behind a link of that speed (`shaped_hosts`; needs
root). The report says how many FLOPs a rank computes in the time of a byte, to be compared with the
8,000 of a GPU with 400 TFLOP/s behind 50 GB/s.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PLANNERS = ("static_cp", "megatron", "hdp")
TOKENS_PER_RANK = 2048
# float32 sums in another order; over the steps of a curve the differences grow.
LOSS_TOLERANCE = 1e-5
CURVE_TOLERANCE = 1e-4


def settings(corpus: Path, run_dir: Path, num_ranks: int) -> dict[str, Any]:
    """A small model, for which a CPU rank's link is as slow as a network is for a GPU's."""
    return {
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 192,
            "num_attention_heads": 2,
            "untie_embeddings_and_output_weights": False,
        },
        "data": {
            "corpora": [{"path": str(corpus)}],
            "max_sequence_length": TOKENS_PER_RANK * num_ranks,
            "tokens_per_rank": TOKENS_PER_RANK,
        },
        "train": {"train_iters": 1000, "global_batch_tokens": 8 * TOKENS_PER_RANK * num_ranks},
        "optim": {"lr": 1e-3},
        "parallel": {"planner": "hdp"},
        "precision": {"dtype": "fp32"},
        "log": {"run_dir": str(run_dir)},
        "launch": {"device": "cpu"},
    }


def write_definitions(path: Path) -> Path:
    """The source of each function and method of the standard library, one a line."""
    with path.open("w", encoding="utf-8") as stream:
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text = source.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    definition = ast.get_source_segment(text, node)
                    stream.write(json.dumps({"text": definition}) + "\n")
    return path


def compare_steps(run: Any, num_steps: int, cost_model: Any) -> list[dict[str, Any]]:
    """The same batches through each planner's plan, in turns; a record a step."""
    import torch.distributed as dist

    from megatron_ext.optimizer import clip_and_step, set_learning_rate
    from megatron_ext.plan_agreement import agree_on_plan
    from megatron_ext.planners import plan_step
    from megatron_ext.run_costs import RunCosts
    from megatron_ext.step import run_micro_batches
    from parallel.plan.predict import predict

    records = []
    for step in range(num_steps + 1):
        refs, lengths = run.data.next_step(run.config.train.global_batch_tokens)
        record: dict[str, Any] = {"longest": max(lengths), "sequences": len(lengths)}
        # Whoever goes first meets a colder cache: take turns.
        turn = step % len(PLANNERS)
        for planner in PLANNERS[turn:] + PLANNERS[:turn]:
            parallel = run.config.parallel.model_copy(update={"planner": planner})
            config = run.config.model_copy(update={"parallel": parallel})
            plan = plan_step(
                lengths, config, num_data_ranks=run.mesh.data_size, costs=RunCosts(cost_model)
            )
            agree_on_plan(plan.digest(), device=run.device.device)
            batches = run.reader.read(plan, refs, run.data.train)
            for chunk in run.chunks:
                chunk.zero_grad_buffer()
            run.optimizer.zero_grad()
            sent = run.reader.exchange.traffic.num_bytes_sent
            dist.barrier()
            began = time.perf_counter()
            loss = run_micro_batches(run.chunks, batches, reader=run.reader)
            seconds = time.perf_counter() - began
            record[planner] = {
                "seconds": seconds,
                "loss": loss.mean,
                "predicted_seconds": predict(plan, cost_model).step_seconds,
                "bytes_sent": run.reader.exchange.traffic.num_bytes_sent - sent,
                "micro_batches": sum(map(len, plan.micro_batches)),
            }
        set_learning_rate(run.optimizer, 1e-3, weight_decay=0.0)
        clip_and_step(run.optimizer, clip_grad=1.0)
        run.device.release_memory()
        records.append(record)
    # The first step warms up.
    return records[1:]


def loss_curve(tree: dict[str, Any], planner: str, num_steps: int, num_ranks: int) -> list[float]:
    from megatron_ext.trainer import train_step

    tree = tree | {"parallel": {"planner": planner}}
    with opened(tree, num_ranks) as run:
        return [float(train_step(run)["loss"]) for _ in range(num_steps)]


def opened(tree: dict[str, Any], num_ranks: int) -> Any:
    import torch

    from megatron_ext.config_check import check_config
    from megatron_ext.config_file import check_tree
    from megatron_ext.devices import open_device
    from megatron_ext.run import open_run

    config = check_config(check_tree(tree, where="hdp_measured"), world_size=num_ranks)
    run_dir = Path(str(config.log.run_dir))
    run_dir.mkdir(parents=True, exist_ok=True)
    return open_run(config, open_device(config, torch.device("cpu")), run_dir)


def as_rank(tree: dict[str, Any], num_steps: int, num_curve_steps: int, output: Path) -> None:
    """What each rank does; rank 0 writes the report."""
    import torch

    from megatron_ext.config_file import check_tree
    from megatron_ext.launch import process_group
    from megatron_ext.launch.ranks import discover
    from megatron_ext.rank import choose_accelerator

    torch.set_num_threads(1)
    info = discover()
    device = choose_accelerator(check_tree(tree, where="hdp_measured"))
    with process_group.running(info, device=device, timeout_seconds=600.0):
        from megatron_ext.model_shape import stage_shape
        from megatron_ext.profile import measure

        with opened(tree, info.world_size) as run:
            profile = measure(run)
            forward_flops = stage_shape(run.config, run.shape).forward_flops_per_token
            records = compare_steps(run, num_steps, profile.cost_model)
        curves = {
            planner: loss_curve(tree, planner, num_curve_steps, info.world_size)
            for planner in PLANNERS
        }
    if info.rank == 0:
        flops_per_second = 3 * forward_flops / profile.linear_seconds
        report = {
            "flops_per_link_byte": (
                flops_per_second / profile.communication.bytes_per_second
                if profile.communication
                else None
            ),
            "profile": {
                "quadratic_seconds": profile.quadratic_seconds,
                "linear_seconds": profile.linear_seconds,
                "fixed_seconds": profile.fixed_seconds,
                "link_bytes_per_second": (
                    profile.communication.bytes_per_second if profile.communication else None
                ),
                "hop_latency_seconds": (
                    profile.communication.latency_seconds if profile.communication else None
                ),
            },
            "device": profile.subject["device"],
            "steps": records,
            "curves": curves,
        }
        output.write_text(json.dumps(report))


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios to static_cp, measured and predicted, and how far losses differ."""
    steps = report["steps"]

    def column(planner: str, key: str) -> list[float]:
        return [step[planner][key] for step in steps]

    def ratios(planner: str, key: str) -> list[float]:
        pairs = zip(column("static_cp", key), column(planner, key), strict=True)
        return [static / other for static, other in pairs]

    found: dict[str, Any] = {}
    for planner in PLANNERS:
        measured = statistics.median(ratios(planner, "seconds"))
        predicted = statistics.median(ratios(planner, "predicted_seconds"))
        found[planner] = {
            "median_seconds": statistics.median(column(planner, "seconds")),
            "median_predicted_seconds": statistics.median(column(planner, "predicted_seconds")),
            "faster_than_static_cp": measured,
            "predicted_faster_than_static_cp": predicted,
            "prediction_error": predicted / measured - 1.0,
            "megabytes_sent": statistics.median(column(planner, "bytes_sent")) / 1e6,
            "largest_loss_difference": max(
                abs(a / b - 1.0)
                for a, b in zip(column(planner, "loss"), column("static_cp", "loss"), strict=True)
            ),
            "largest_curve_difference": max(
                abs(a / b - 1.0)
                for a, b in zip(
                    report["curves"][planner], report["curves"]["static_cp"], strict=True
                )
            ),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--curve-steps", type=int, default=4)
    parser.add_argument("--corpus", type=Path, help="a prepared corpus in place of the library")
    parser.add_argument("--link-megabits", type=float, help="a host for each rank; needs root")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.as_rank is not None:
        tree = json.loads((options.as_rank / "tree.json").read_text())
        as_rank(tree, options.steps, options.curve_steps, options.as_rank / "report.json")
        return 0

    from megatron_ext.data.prepare import prepare
    from megatron_ext.data.settings import PrepareSettings
    from scripts.bench.shaped_hosts import run_linked

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = options.corpus or folder / "corpus"
        if options.corpus is None:
            prepare(
                PrepareSettings(
                    inputs=(str(write_definitions(folder / "definitions.jsonl")),),
                    output=corpus,
                    tokenizer="bytes",
                    validation_fraction=0.0,
                ),
                show_progress=False,
            )
        tree = settings(corpus, folder / "run", options.ranks)
        (folder / "tree.json").write_text(json.dumps(tree))
        command = [
            sys.executable, __file__, "--as-rank", name,
            "--steps", str(options.steps), "--curve-steps", str(options.curve_steps),
        ]  # fmt: skip
        if (code := run_linked(command, options.ranks, link_megabits=options.link_megabits)) != 0:
            return code
        report = json.loads((folder / "report.json").read_text())
    found = summary(report)
    print(
        f"{'planner':10} {'median s':>9} {'predicted s':>12} {'x static_cp':>12} {'predicted':>10} "
        f"{'MB sent':>8} {'loss diff':>10} {'curve diff':>10}"
    )
    for planner, row in found.items():
        print(
            f"{planner:10} {row['median_seconds']:9.3f} {row['median_predicted_seconds']:12.3f} "
            f"{row['faster_than_static_cp']:12.2f} {row['predicted_faster_than_static_cp']:10.2f} "
            f"{row['megabytes_sent']:8.1f} {row['largest_loss_difference']:10.1e} "
            f"{row['largest_curve_difference']:10.1e}"
        )
    if flops_per_byte := report["flops_per_link_byte"]:
        print(f"a rank computes {flops_per_byte:,.0f} FLOPs in the time of one byte on its link")
    if options.json:
        tree = {"date": str(date.today()), "ranks": options.ranks, "summary": found} | report
        options.json.write_text(json.dumps(tree, indent=1) + "\n")
    worst_loss = max(row["largest_loss_difference"] for row in found.values())
    worst_curve = max(row["largest_curve_difference"] for row in found.values())
    is_same = worst_loss <= LOSS_TOLERANCE and worst_curve <= CURVE_TOLERANCE
    if not (is_same and math.isfinite(worst_curve)):
        print("error: the planners do not compute the same", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
