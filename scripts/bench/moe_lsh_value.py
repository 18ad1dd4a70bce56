"""What compressing the way to the experts costs in held-out loss: loss against rows sent.

    python scripts/bench/moe_lsh_value.py --json FILE [--settings NAME ...] [--steps 300]
    python scripts/bench/moe_lsh_value.py --json FILE --plot docs/pictures/moe-lsh-rate.png

Trains the recipe `moe-quickstart` on one rank from the same start on the same batches, once exact
and once with each setting, and adds a line for each to FILE; what is there already is left alone.
Micro-batches are those of the recipe's ranks and buckets are made in each, so the losses are those
of ranks that share the experts; only that nothing travels here.

| figure             | what it is                                                                 |
|--------------------|----------------------------------------------------------------------------|
| rate               | rows sent / choices, over all layers with experts and all steps            |
| loss               | held-out loss of the trained weights, computed exactly                     |
| compressed loss    | the same with compression as in training; with means it sees later tokens  |
| ratio              | loss / loss of the exact run of the same seed                              |
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

TARGET_RATE, TARGET_RATIO = 0.25, 1.005


@dataclass(frozen=True, slots=True)
class Setting:
    """One run: keys of `moe.moe_lsh_*` without that prefix; none: exact."""

    keys: dict[str, Any] = field(default_factory=dict)

    def overrides(self) -> list[str]:
        return [f"moe.moe_lsh_{key}={json.dumps(value)}" for key, value in self.keys.items()]


def _hashes(num_hashes: int, hash_dim: int, **others: Any) -> Setting:
    return Setting({"num_hashes": num_hashes, "hash_dim": hash_dim} | others)


REFINED = {"num_refinements": 1}
PAPER, PLAIN = {"residual_scale": 1.0}, {"residual_scale": 0.0}
FIRST = PLAIN | {"centroid": "first"}
SETTINGS: dict[str, Setting] = {
    "exact": Setting(),
    **{
        f"{num_hashes}x{hash_dim}{name}": _hashes(num_hashes, hash_dim, **others)
        for num_hashes, hash_dim in ((4, 2), (6, 2), (6, 4), (6, 8), (6, 16), (10, 8), (10, 16))
        for name, others in (
            ("", PAPER),
            (" no residual", PLAIN),
            (" first", FIRST),
            (" refined", REFINED | PLAIN),
        )
    },
}


def run_setting(
    setting: Setting, *, seed: int, steps: int, corpus: Path | None, fast: bool
) -> dict[str, Any]:
    """Train and validate; the process group is running."""
    import torch

    from megatron_ext.config_check import check_config
    from megatron_ext.config_file import load_config
    from megatron_ext.devices import open_device
    from megatron_ext.run import open_run
    from megatron_ext.trainer import train_step
    from megatron_ext.validation import validate

    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"log.run_dir={folder}",
            f"train.train_iters={steps}",
            f"optim.lr_warmup_iters={max(1, steps // 10)}",
            "train.eval_interval=0",
            "parallel.expert_model_parallel_size=1",
            "launch.device=cpu",
            f"train.seed={seed}",
            *setting.overrides(),
        ]
        if corpus is not None:
            overrides += [f"data.corpora.0.path={corpus}", "data.corpora.0.prepare=null"]
        if fast:
            overrides += ["train.global_batch_tokens=1024", "train.eval_tokens=20000"]
        config = check_config(load_config("moe-quickstart", overrides), world_size=1)
        began = time.perf_counter()
        with open_run(config, open_device(config, torch.device("cpu")), Path(folder)) as run:
            records = [train_step(run) for _ in range(steps)]
            seconds = time.perf_counter() - began
            exact = validate(run)["validation_loss"]
            compressed = exact
            if run.compression is not None:
                run.compression.replace_exact()
                compressed = validate(run)["validation_loss"]
    return _result(config, records) | {
        "loss": exact,
        "compressed_loss": compressed,
        "seconds": seconds,
    }


def _result(config: Any, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over steps; layers that are not compressed send every row."""
    layers = config.lsh_layers
    by_layer = [1.0 for has_experts in config.moe_layers if has_experts]
    errors = list[float]()
    if layers:
        numbers = [layer for layer, has_experts in enumerate(config.moe_layers) if has_experts]
        for place, layer in enumerate(layers):
            rates = [record["lsh_rate"][place] for record in records]
            by_layer[numbers.index(layer)] = sum(rates) / len(rates)
            errors.append(sum(r["lsh_relative_error"][place] for r in records) / len(records))
    return {
        "rate": sum(by_layer) / len(by_layer),
        "rate_by_layer": by_layer,
        "relative_error_by_layer": errors,
        "train_loss": [record["loss"] for record in records],
    }


def add_ratios(results: Sequence[dict[str, Any]]) -> None:
    """Each loss over that of the exact run with its seed and steps."""
    exact = {(r["seed"], r["steps"]): r["loss"] for r in results if not r["keys"]}
    for result in results:
        base = exact.get((result["seed"], result["steps"]))
        result["ratio"] = result["loss"] / base if base else None
        result["compressed_ratio"] = result["compressed_loss"] / base if base else None


def print_table(results: Sequence[dict[str, Any]]) -> None:
    heads = ("rate", "error", "loss", "ratio", "compressed")
    print(f"{'setting':22} {'seed':>5} " + " ".join(f"{head:>10}" for head in heads))
    for result in sorted(results, key=lambda result: result["rate"]):
        errors = result["relative_error_by_layer"] or [0.0]
        figures = (
            result["rate"],
            sum(errors) / len(errors),
            result["loss"],
            result["ratio"] or float("nan"),
            result["compressed_ratio"] or float("nan"),
        )
        row = " ".join(f"{figure:10.4f}" for figure in figures)
        print(f"{result['name']:22} {result['seed']:5} {row}")


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss above the exact run's against rate: a dot a run; means over seeds, joined by family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    families: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for result in results:
        if result["keys"] and result["ratio"]:
            family = result["name"].partition(" ")[2] or "with residual (paper)"
            point = (100 * result["rate"], 100 * (result["ratio"] - 1))
            families.setdefault(family, {}).setdefault(result["name"], []).append(point)
    for family, settings in sorted(families.items()):
        means = sorted(
            tuple(sum(values) / len(points) for values in zip(*points, strict=True))
            for points in settings.values()
        )
        (line,) = axes.plot(*zip(*means, strict=True), "o-", label=family)
        runs = [point for points in settings.values() for point in points]
        axes.plot(*zip(*runs, strict=True), ".", color=line.get_color(), alpha=0.5)
    axes.axhline(100 * (TARGET_RATIO - 1), color="grey", linewidth=0.8, linestyle=":")
    axes.axvline(100 * TARGET_RATE, color="grey", linewidth=0.8, linestyle=":")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("rows sent, % of choices")
    axes.set_ylabel("held-out loss above the exact run's, %")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def read_results(path: Path) -> list[dict[str, Any]]:
    """A result a line."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    add_ratios(results)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="a line for each setting")
    parser.add_argument("--settings", nargs="*", default=None, choices=sorted(SETTINGS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1234, help="of weights and order of text")
    parser.add_argument("--fast", action="store_true", help="half the batch, a third of held-out")
    parser.add_argument("--corpus", type=Path, help="a prepared corpus in place of the recipe's")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    wanted = list(SETTINGS) if options.settings is None else options.settings
    done = {(r["name"], r["steps"], r["seed"]) for r in read_results(options.json)}
    missing = [name for name in wanted if (name, options.steps, options.seed) not in done]
    if missing and not options.plot:
        _run_all(missing, options)
    results = read_results(options.json)
    print_table(results)
    if options.plot:
        draw(results, options.plot)
    return 0


def _run_all(names: Sequence[str], options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from megatron_ext.config_file import load_config
    from megatron_ext.rank import choose_accelerator

    torch.set_num_threads(1)
    choose_accelerator(load_config("moe-quickstart", ["launch.device=cpu"]))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for name in names:
        setting = SETTINGS[name]
        result = run_setting(
            setting,
            seed=options.seed,
            steps=options.steps,
            corpus=options.corpus,
            fast=options.fast,
        )
        line = {"name": name, "steps": options.steps, "seed": options.seed}
        line |= asdict(setting) | result
        with options.json.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(f"{name}: rate {result['rate']:.3f}, loss {result['loss']:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
