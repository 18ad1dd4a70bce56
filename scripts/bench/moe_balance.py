"""Does it matter over which tokens the experts' load is to be even? Three domains, three seeds.

    python scripts/bench/moe_balance.py --folder FOLDER [--only global:1 micro:1 ...]
        [--coefficient 0.01] [--json FILE] [--picture FILE]

"Demons in the Detail" (2501.11873) says: a balance loss over each micro-batch makes every document
use all experts alike, so none can specialise; over the global batch only the corpus has to. Here
is its condition: domains in equal parts (`domain_texts`), micro-batches of one piece of one
document, 16 of them a step (over how many ranks makes no difference, see `expert_balance`). Same
model, tokens and seeds with the loss over the global batch, over each micro-batch, and with none.

Each run leaves its folder below FOLDER/runs; a run that is there is not repeated, so the whole can
be made in parts (`--only KIND:SEED`). The report is made of all runs that are there: held-out loss,
specialisation (`moe.expert_load`, mean over layers), load, as mean and standard deviation over
seeds, and the differences of global minus micro seed by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_ext.expert_plot import draw_experts
from megatron_ext.metrics import read_metrics
from scripts.bench.domain_texts import prepare_domains

KINDS = {"global": "global_aux_loss", "micro": "aux_loss", "none": "none"}
SEEDS = (1, 2, 3)
VOCAB_SIZE = 1024
FIGURES = {
    "validation_loss": "held-out loss",
    "specialisation": "specialisation",
    "top_share": "top share",
    "load_max_over_mean": "max/mean load",
}


def settings(
    corpora: dict[str, Path],
    run_dir: Path,
    *,
    kind: str,
    coefficient: float,
    seed: int,
    num_ranks: int,
) -> dict[str, Any]:
    """Micro-batches of 256 tokens, one piece of one document; 16 of them a step."""
    return {
        "model": {
            "num_layers": 2,
            "hidden_size": 96,
            "ffn_hidden_size": 192,
            "num_attention_heads": 4,
            "qk_layernorm": True,
        },
        "data": {
            "corpora": [{"path": str(path), "label": name} for name, path in corpora.items()],
            "max_sequence_length": 256,
            "tokens_per_rank": 256,
        },
        "train": {
            "train_iters": 400,
            "global_batch_tokens": 16 * 256,
            "seed": seed,
            "eval_interval": 0,
            "eval_tokens": 90_000,
        },
        "optim": {"lr": 3e-3, "lr_decay_style": "linear", "lr_warmup_iters": 40},
        "moe": {
            "num_moe_experts": 12,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 64,
        }
        | (
            {}
            if kind == "none"
            else {
                "moe_router_load_balancing_type": KINDS[kind],
                "moe_aux_loss_coeff": coefficient,
            }
        ),
        "precision": {"dtype": "fp32"},
        "checkpoint": {"save_interval": 40, "keep": 1},
        "log": {"run_dir": str(run_dir), "log_interval": 20},
        "launch": {"device": "cpu", "num_ranks": num_ranks},
    }


def run_name(kind: str, coefficient: float, seed: int) -> str:
    return f"{kind}-{0 if kind == 'none' else coefficient:g}-seed{seed}"


def run_once(folder: Path, *, kind: str, coefficient: float, seed: int, num_ranks: int) -> None:
    """Train one, unless it is there."""
    run_dir = folder / "runs" / run_name(kind, coefficient, seed)
    if read_run(run_dir) is not None:
        return
    corpora = prepare_domains(folder, vocab_size=VOCAB_SIZE)
    tree = settings(
        corpora, run_dir, kind=kind, coefficient=coefficient, seed=seed, num_ranks=num_ranks
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = [sys.executable, "-m", "megatron_ext", "train", str(recipe)]
    print(run_dir.name, flush=True)
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def read_run(run_dir: Path) -> dict[str, Any] | None:
    """The figures of a finished run, and the counts of its held-out text."""
    records = read_metrics(run_dir / "metrics.jsonl")
    if not records or "validation_loss" not in records[-1]:
        return None
    last = records[-1]
    tail = records[len(records) // 2 :]
    kind, coefficient, seed = run_dir.name.rsplit("-", 2)
    loads = [max(record["expert_load_max_over_mean"]) for record in tail]
    return {
        "kind": kind,
        "coefficient": float(coefficient),
        "seed": int(seed.removeprefix("seed")),
        "steps": last["step"],
        "tokens": last["total_tokens"],
        "train_seconds": sum(record["step_seconds"] for record in records),
        "validation_loss": last["validation_loss"],
        "validation_bits_per_byte": last["validation_bits_per_byte"],
        "specialisation": statistics.fmean(last["validation_expert_specialisation"]),
        "top_share": statistics.fmean(last["validation_expert_top_share"]),
        "load_max_over_mean": statistics.fmean(loads),
        "experts": json.loads((run_dir / "experts.json").read_text(encoding="utf-8")),
    }


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """All finished runs."""
    found = (read_run(run_dir) for run_dir in sorted((folder / "runs").glob("*-seed*")))
    return [run for run in found if run is not None]


def summarise(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind and coefficient [mean, standard deviation over seeds] of each figure."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["kind"], run["coefficient"]), []).append(run)
    return [
        {"kind": kind, "coefficient": coefficient, "seeds": len(group)}
        | {key: mean_and_spread([run[key] for run in group]) for key in FIGURES}
        for (kind, coefficient), group in sorted(groups.items(), key=lambda item: item[0][::-1])
    ]


def differences(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Global minus micro of equal coefficient and seed: [mean, standard deviation]."""
    by_name = {(run["kind"], run["coefficient"], run["seed"]): run for run in runs}
    found = []
    for coefficient in sorted({run["coefficient"] for run in runs if run["kind"] == "global"}):
        pairs = [
            (run, by_name["micro", coefficient, run["seed"]])
            for run in runs
            if (run["kind"], run["coefficient"]) == ("global", coefficient)
            and ("micro", coefficient, run["seed"]) in by_name
        ]
        if pairs:
            found.append(
                {"coefficient": coefficient, "seeds": len(pairs)}
                | {
                    key: mean_and_spread([mine[key] - other[key] for mine, other in pairs])
                    for key in FIGURES
                }
            )
    return found


def mean_and_spread(values: Sequence[float]) -> list[float | None]:
    """[mean, standard deviation of the sample]; one value has no deviation (null in JSON)."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return [statistics.fmean(values), spread]


def table(rows: Sequence[dict[str, Any]], deltas: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| balance over | coefficient | seeds | " + " | ".join(FIGURES.values()) + " |",
        "|---" * (3 + len(FIGURES)) + "|",
    ]
    named = [(row["kind"], row) for row in rows]
    named += [("global - micro", row) for row in deltas]
    for name, row in named:
        cells = [
            f"{mean:.4f}" if spread is None else f"{mean:.4f} +- {spread:.4f}"
            for mean, spread in (row[key] for key in FIGURES)
        ]
        head = f"| {name} | {row['coefficient']:g} | {row['seeds']} | "
        lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, Any]], path: Path, *, coefficient: float, seed: int) -> None:
    """The heat maps of the kinds side by side, of one seed."""
    chosen = [
        (run["kind"], run["experts"])
        for kind in KINDS
        for run in runs
        if (run["kind"], run["seed"]) == (kind, seed)
        and (kind == "none" or run["coefficient"] == coefficient)
    ]
    if chosen:
        draw_experts(chosen, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[f"{k}:{s}" for s in SEEDS for k in KINDS])
    parser.add_argument("--coefficient", type=float, default=0.01)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    for word in arguments.only:
        kind, _, seed = word.partition(":")
        if kind not in KINDS or not seed.isdecimal():
            parser.error(f"--only {word}: expected KIND:SEED with KIND one of {', '.join(KINDS)}")
        run_once(
            arguments.folder,
            kind=kind,
            coefficient=arguments.coefficient,
            seed=int(seed),
            num_ranks=arguments.ranks,
        )
    runs = read_runs(arguments.folder)
    rows, deltas = summarise(runs), differences(runs)
    print(table(rows, deltas))
    if arguments.json:
        report = {"date": str(date.today()), "summary": rows, "differences": deltas, "runs": runs}
        arguments.json.write_text(
            json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
    if arguments.picture:
        draw(runs, arguments.picture, coefficient=arguments.coefficient, seed=SEEDS[0])


if __name__ == "__main__":
    main()
