"""Model FLOP utilisation of a recipe on one device: real text, whole training steps.

    python scripts/bench/mfu.py [--recipe 1b] [--steps 20] [--json FILE] [section.key=value ...]

On a GPU this answers "what MFU does the 1b recipe reach at sequence 4096?" in about two minutes; on
a CPU give a smaller recipe (quickstart). The text is the standard library's source as one document,
so that every sequence has the full length; the vocabulary has the size of Llama 3's whatever the
tokenizer, because the output layer is part of the work. Medians over the steps after warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

WARM_UP_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="1b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()

    from megatron_ext.config_check import check_config
    from megatron_ext.config_file import load_config
    from megatron_ext.data.prepare import prepare
    from megatron_ext.data.settings import PrepareSettings
    from megatron_ext.devices import open_device, peak_memory_bytes
    from megatron_ext.launch import process_group
    from megatron_ext.launch.ranks import discover
    from megatron_ext.rank import choose_accelerator
    from scripts.bench.library_text import make_text

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(
            PrepareSettings(
                inputs=(str(make_text(folder, 8_000_000)),),
                output=folder / "corpus",
                tokenizer="bytes",
                validation_fraction=0.0,
            ),
            show_progress=False,
        )
        overrides = [
            f"data.corpora=[{{path: {folder / 'corpus'}}}]",
            "model.vocab_size=128256",
            # Four micro-batches a step: gradients are accumulated, as in real training.
            "train.global_batch_tokens=null",
            "train.num_micro_batches=4",
            *arguments.overrides,
        ]
        config = check_config(load_config(arguments.recipe, overrides), world_size=1)
        device = choose_accelerator(config)
        with process_group.running(discover({}), device=device, timeout_seconds=300.0) as device:
            from megatron_ext.run import open_run
            from megatron_ext.trainer import train_step

            with open_run(config, open_device(config, device), folder) as run:
                records = []
                for _ in range(WARM_UP_STEPS + arguments.steps):
                    records.append(train_step(run))
                    print(
                        f"step {records[-1]['step']}: {records[-1]['tokens_per_second']:,.0f} "
                        f"tokens/s, MFU {records[-1]['mfu']:.1%}",
                        flush=True,
                    )
                measured = records[WARM_UP_STEPS:]
                report = {
                    "date": str(date.today()),
                    "device": run.device.describe(),
                    "recipe": arguments.recipe,
                    "overrides": arguments.overrides,
                    "sequence_length": config.data.max_sequence_length,
                    "tokens_per_second": statistics.median(
                        r["tokens_per_second"] for r in measured
                    ),
                    "model_tflops": statistics.median(r["model_tflops"] for r in measured),
                    "mfu": statistics.median(r["mfu"] for r in measured),
                    "peak_memory_bytes": peak_memory_bytes(run.device),
                }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
