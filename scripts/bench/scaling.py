"""Weak and strong scaling of whole training steps with real ranks.

    python scripts/bench/scaling.py [--ranks 1 2 4 8] [--json FILE] [--plot FILE]
        [--recipe NAME] [section.key=value ...]

On a laptop it starts the ranks itself, one thread each. On a cluster torchrun or srun does, and the
same command measures that number of ranks and adds it to --json (on a shared file system):

    for n in 1 2 4 8; do
        torchrun --nproc-per-node $n scripts/bench/scaling.py --recipe 1b --json scaling.json
    done
    srun --nodes 4 --ntasks-per-node 8 --gpus-per-task 1 \\
        python scripts/bench/scaling.py --recipe 1b --json scaling.json

The text is one long file, so that every sequence has the full length. A step is what `train` does;
its time is the slowest rank's, median over --steps after two that warm up. How efficiency and MFU
are counted: `scaling_report`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_ext.config import Config
from scripts.bench.library_text import prepare_text
from scripts.bench.scaling_report import (
    MODES,
    Point,
    from_json,
    merge,
    num_units,
    plot,
    table,
    to_json,
)

if TYPE_CHECKING:
    import torch

WARM_UP_STEPS = 2
# Of all ranks together in strong scaling, in micro-batches of one rank.
STRONG_MICRO_BATCHES = 8


def mode_overrides(mode: str, tokens_per_rank: int) -> list[str]:
    """What a step of the mode is."""
    if mode == "weak":
        return ["train.global_batch_tokens=null", "train.num_micro_batches=1"]
    return [f"train.global_batch_tokens={STRONG_MICRO_BATCHES * tokens_per_rank}"]


def measure_here(
    recipe: str, overrides: Sequence[str], *, modes: Sequence[str], steps: int, folder: Path
) -> list[Point]:
    """What each rank does; the same points on all."""
    import torch

    from megatron_ext.config_file import load_config
    from megatron_ext.launch import process_group
    from megatron_ext.launch.ranks import discover
    from megatron_ext.rank import choose_accelerator

    info = discover()
    corpus = folder / "corpus"
    overrides = [f"data.corpora=[{{path: {corpus}}}]", *overrides]
    config = load_config(recipe, overrides)
    device = choose_accelerator(config)
    if device.type == "cpu":
        torch.set_num_threads(1)
    if info.rank == 0:
        prepare_text(folder)
    with process_group.running(info, device=device, timeout_seconds=900.0) as device:
        torch.distributed.barrier()
        return [
            measure_mode(recipe, overrides, mode=mode, steps=steps, device=device, folder=folder)
            for mode in modes
        ]


def measure_mode(
    recipe: str, overrides: Sequence[str], *, mode: str, steps: int, device: object, folder: Path
) -> Point:
    import torch

    from megatron_ext.config_check import check_config
    from megatron_ext.config_file import load_config
    from megatron_ext.devices import open_device, peak_memory_bytes
    from megatron_ext.run import open_run
    from megatron_ext.trainer import train_step

    assert isinstance(device, torch.device)
    world_size = torch.distributed.get_world_size()
    plain = load_config(recipe, overrides)
    words = [*overrides, *mode_overrides(mode, plain.data.micro_batch_tokens)]
    config = check_config(load_config(recipe, words), world_size=world_size)
    run_dir = folder / f"{mode}-{world_size}"
    run_dir.mkdir(parents=True, exist_ok=True)
    with open_run(config, open_device(config, device), run_dir) as run:
        records = [train_step(run) for _ in range(WARM_UP_STEPS + steps)][WARM_UP_STEPS:]
        tokens = statistics.median(int(record["tokens"] or 0) for record in records)
        speed = statistics.median(float(record["tokens_per_second"] or 0.0) for record in records)
        flops = statistics.median(float(record["model_tflops"] or 0.0) for record in records)
        num_cores = None if run.device.is_cuda else len(os.sched_getaffinity(0))
        units = num_units(world_size, num_cores=num_cores)
        return Point(
            mode=mode,
            num_ranks=world_size,
            num_units=units,
            tokens_per_step=round(tokens),
            step_seconds=tokens / speed,
            model_flops_per_second=flops * 1e12 * world_size,
            peak_flops_per_rank=run.device.peak_flops,
            peak_memory_bytes=most_of_all_ranks(peak_memory_bytes(run.device), run.device.device),
            predicted_tokens_per_second=predicted(config, world_size, units),
            device=run.device.describe(),
            measured_on=str(date.today()),
        )


def most_of_all_ranks(num_bytes: int, device: torch.device) -> int:
    import torch

    shared = torch.tensor(float(num_bytes), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def predicted(config: Config, num_ranks: int, num_units: int) -> float:
    """Tokens a second that `plan` says; ranks that share a unit have so much less of it."""
    from megatron_ext.planning.predict import predict
    from megatron_ext.planning.subject import subject_of

    subject = subject_of(config, num_ranks=num_ranks)
    found = predict(subject.model, subject.layout, subject.device)
    return found.tokens_per_second * num_units / num_ranks


def report(points: Sequence[Point], json_path: Path | None, plot_path: Path | None) -> None:
    """Add to what the file holds, write, print."""
    if json_path is not None:
        if json_path.exists():
            points = merge(from_json(json.loads(json_path.read_text())["points"]), points)
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"points": to_json(points)}, indent=1) + "\n")
    print(table(points))
    if any(point.num_units < point.num_ranks for point in points):
        print(
            "Ranks beyond the cores share them: 'units' are the cores in use, and 'efficiency' is "
            "of a core; 'per rank' is what sharing makes of it."
        )
    if plot_path is not None:
        plot(points, plot_path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="points found there are kept")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--folder", type=Path, help="for text and runs; under torchrun and srun "
                        "one that all hosts see (runs/scaling)")  # fmt: skip
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    from megatron_ext.launch.local import run_local
    from megatron_ext.launch.ranks import discover

    info = discover()
    if info.source != "single":
        points = measure_here(
            options.recipe,
            options.overrides,
            modes=options.modes,
            steps=options.steps,
            folder=options.folder or Path("runs/scaling"),
        )
        if info.rank == 0 and options.as_rank is not None:
            options.as_rank.write_text(json.dumps({"points": to_json(points)}))
        elif info.rank == 0:
            report(points, options.json, options.plot)
        return 0
    points = []
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        for num_ranks in options.ranks:
            output = Path(name) / f"{num_ranks}.json"
            command = [
                *(sys.executable, __file__, *options.overrides, "--recipe", options.recipe),
                *("--steps", str(options.steps), "--folder", str(folder)),
                *("--as-rank", str(output), "--modes", *options.modes),
            ]
            if (code := run_local(command, num_ranks)) != 0:
                return code
            points += from_json(json.loads(output.read_text())["points"])
    report(points, options.json, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
