"""Tokens per second on one rank: `megatron-ext train` beside a plain single-file PyTorch loop.

    python scripts/bench/baseline.py [--rounds 7] [--steps 4] [--json FILE]

Each side is a process of its own with the same number of threads; they take turns, so that both
see the same machine. Ours is the whole training step as `train` runs it (order, plan, reading,
forward, backward, clipping, update, metrics). The text is one long file, so that both sides compute
sequences of exactly 512 tokens. Ratios are taken round by round; medians are printed.

The peer in bf16 is measured twice: with float32 weights under autocast, as usual, and with weights
in bf16 and no float32 copy, which is less work than ours and trains worse.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

LENGTH, ROWS, VOCAB_SIZE = 512, 8, 4096
TOKENS = LENGTH * ROWS


def plain_side(connection: Connection, text: Path, precision: str) -> None:
    import torch

    from megatron_ext.config_file import load_config
    from scripts.bench.plain_loop import PlainLoop, Shape

    torch.set_num_threads(1)
    stream = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    model = load_config("quickstart").model
    shape = Shape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_heads=model.num_attention_heads,
        vocab_size=VOCAB_SIZE,
        rotary_base=model.rotary_base,
    )
    loop = PlainLoop(shape, rows=ROWS, length=LENGTH, precision=precision)
    position = 0
    while (num_steps := connection.recv()) > 0:
        began = time.perf_counter()
        for _ in range(num_steps):
            loop.step(stream[position : position + TOKENS + 1])
            position += TOKENS
        connection.send(num_steps * TOKENS / (time.perf_counter() - began))


def our_side(connection: Connection, corpus: Path, precision: str) -> None:
    import torch

    from megatron_ext.config_check import check_config
    from megatron_ext.config_file import load_config
    from megatron_ext.devices import open_device
    from megatron_ext.launch import process_group
    from megatron_ext.launch.ranks import discover
    from megatron_ext.rank import choose_accelerator

    torch.set_num_threads(1)
    overrides = [
        f"data.corpora=[{{path: {corpus}}}]",
        f"data.max_sequence_length={LENGTH}",
        f"data.tokens_per_rank={TOKENS}",
        f"train.global_batch_tokens={TOKENS}",
        f"precision.dtype={precision}",
        f"model.vocab_size={VOCAB_SIZE}",
        "launch.device=cpu",
    ]
    config = check_config(load_config("quickstart", overrides), world_size=1)
    device = choose_accelerator(config)
    with process_group.running(discover({}), device=device, timeout_seconds=60.0) as device:
        from megatron_ext.run import open_run
        from megatron_ext.trainer import train_step

        with open_run(config, open_device(config, device), corpus.parent) as run:
            while (num_steps := connection.recv()) > 0:
                began = time.perf_counter()
                tokens = sum(int(train_step(run)["tokens"] or 0) for _ in range(num_steps))
                connection.send(tokens / (time.perf_counter() - began))


class Side:
    """One side in its own process."""

    def __init__(self, target: Any, *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=target, args=(other, *arguments), daemon=True)
        self.process.start()

    def tokens_per_second(self, num_steps: int) -> float:
        self.connection.send(num_steps)
        return float(self.connection.recv())

    def close(self) -> None:
        self.connection.send(0)
        self.process.join(timeout=30)


def compare(ours: Side, peer: Side, *, rounds: int, steps: int) -> dict[str, float]:
    for side in (ours, peer):
        side.tokens_per_second(2)
    pairs = [(ours.tokens_per_second(steps), peer.tokens_per_second(steps)) for _ in range(rounds)]
    ratios = [own / other for own, other in pairs]
    return {
        "ours_tokens_per_second": statistics.median(own for own, _ in pairs),
        "peer_tokens_per_second": statistics.median(other for _, other in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps a turn")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    from megatron_ext.data.prepare import prepare
    from megatron_ext.data.settings import PrepareSettings
    from scripts.bench.library_text import make_text

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = make_text(folder, 4_000_000)
        prepare(
            PrepareSettings(
                inputs=(str(text),),
                output=folder / "corpus",
                tokenizer="bytes",
                validation_fraction=0.0,
            ),
            show_progress=False,
        )
        for ours, peer in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "bf16_weights")):
            sides = Side(our_side, folder / "corpus", ours), Side(plain_side, text, peer)
            result = compare(*sides, rounds=arguments.rounds, steps=arguments.steps)
            results[peer] = result
            for side in sides:
                side.close()
            print(
                f"{peer:>13}: ours {result['ours_tokens_per_second']:>7,.0f} tokens/s, plain loop "
                f"{result['peer_tokens_per_second']:>7,.0f}, ratio {result['ratio']:.3f} "
                f"({result['ratio_min']:.3f} to {result['ratio_max']:.3f})",
                flush=True,
            )
    if arguments.json:
        report = {"date": str(date.today()), "machine": platform.processor(), "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
