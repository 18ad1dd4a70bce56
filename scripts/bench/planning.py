"""Predicted beside published training speed: what the planner's constants give.

    python scripts/bench/planning.py [--json FILE] [--plot FILE] [--parts]

No rank is started. Each published figure is counted as its authors count: Frontier's (Megatron's
formula of 2021) with recomputation and with whole squares in attention, the others without. What
`is_fitted` says: the constants of a device profile were fitted to it, or it was only predicted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_ext.planning.device_profile import NumberFormat, load_profile
from megatron_ext.planning.layout import Layout, ModelSize, Recompute
from megatron_ext.planning.predict import model_flops_per_token, predict

Counting = Literal["model", "with recomputation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A run that somebody else measured, in TFLOP/s of a device as they count them."""

    name: str
    source: str
    device: str
    tflops: float
    counting: Counting
    is_fitted: bool
    model: ModelSize
    layout: Layout


def gpt(layers: int, hidden: int, heads: int, *, vocab: int, sequence: int) -> ModelSize:
    """GPT-3's form: two matrices of 4 h in the feed-forward layer, keys for every head."""
    return ModelSize(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // heads,
        vocab_size=vocab,
        sequence_length=sequence,
        is_tied=True,
        gated=False,
    )


def llama(layers: int, hidden: int, ffn: int, heads: int) -> ModelSize:
    """Llama 3's form: SwiGLU, 8 groups of keys, sequences of 8,192."""
    return ModelSize(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=8,
        kv_channels=hidden // heads,
        vocab_size=128_256,
        sequence_length=8192,
    )


def experts(
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    *,
    num_experts: int,
    topk: int,
    width: int,
    vocab: int,
    head: int = 128,
    dense: int = 0,
    dense_ffn: int = 0,
    shared: int = 0,
) -> ModelSize:
    """A mixture of experts on sequences of 4,096; the first `dense` layers have none."""
    return ModelSize(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=dense_ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head,
        vocab_size=vocab,
        sequence_length=4096,
        moe_layers=tuple(layer >= dense for layer in range(layers)),
        num_experts=num_experts,
        expert_ffn_size=width,
        shared_ffn_size=shared,
        topk=topk,
        router_parameters=hidden * num_experts,
    )


def spread(
    ranks: int,
    *,
    tensor: int,
    pipeline: int,
    batch: int,
    sequence: int,
    virtual: int = 1,
    expert: int = 1,
    expert_overlap: float = 0.0,
    context: int = 1,
    zero: int = 1,
    recompute: Recompute = "selective",
    sequence_parallel: bool | None = None,
    overlap: bool = True,
    number_format: NumberFormat = "bf16",
) -> Layout:
    """batch: sequences of a step; one sequence a micro-batch."""
    data = ranks // (tensor * pipeline)
    return Layout(
        num_ranks=ranks,
        tensor_size=tensor,
        pipeline_size=pipeline,
        virtual_size=virtual,
        expert_size=expert,
        sequence_parallel=tensor > 1 if sequence_parallel is None else sequence_parallel,
        tokens_per_rank=sequence // context,
        num_micro_batches=batch * context // data,
        recompute=recompute,
        recompute_modules=("core_attn",),
        recompute_num_layers=1,
        zero_stage=zero,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        weight_bytes=2,
        grad_bytes=4,
        state_bytes=12,
        number_format=number_format,
        context_size=context,
        expert_overlap=expert_overlap,
    )


def frontier(
    name: str, tflops: float, model: ModelSize, ranks: int, tensor: int, pipeline: int, batch: int
) -> Published:
    layout = spread(
        ranks,
        tensor=tensor,
        pipeline=pipeline,
        batch=batch,
        sequence=model.sequence_length,
        zero=0 if tensor == 1 else 1,
        recompute="full",
        sequence_parallel=False,
        overlap=False,
    )
    return Published(
        name=name,
        source="arXiv 2312.12705",
        device="mi250x",
        tflops=tflops,
        counting="with recomputation",
        is_fitted=True,
        model=model,
        layout=layout,
    )


def h100(
    name: str, source: str, tflops: float, model: ModelSize, layout: Layout, *, is_fitted: bool
) -> Published:
    return Published(
        name=name,
        source=source,
        device="h100",
        tflops=tflops,
        counting="model",
        is_fitted=is_fitted,
        model=model,
        layout=layout,
    )


def published_runs() -> list[Published]:
    """Megatron's README gives share of 989 TFLOP/s and no layout for GPT: TP 8, and PP 12 (175B) or
    16 (462B) with as many chunks as there are layers, are ours."""
    runs = [
        frontier("22B", 73.5, gpt(48, 6144, 48, vocab=51_200, sequence=2048), 16, 1, 8, 640),
        frontier("175B", 69.2, gpt(96, 12288, 96, vocab=51_200, sequence=2048), 128, 4, 16, 640),
        frontier("1T", 61.2, gpt(128, 25600, 200, vocab=51_200, sequence=2048), 1024, 8, 64, 1600),
    ]
    readme, summary = "Megatron-LM README", "Megatron-Bridge, performance summary"
    gpt3 = gpt(96, 12288, 96, vocab=131_072, sequence=4096)
    for ranks, share, is_fitted in ((96, 0.47, True), (4608, 0.42, False)):
        layout = spread(ranks, tensor=8, pipeline=12, virtual=8, batch=1152, sequence=4096)
        runs.append(
            h100(f"GPT 175B, {ranks}", readme, 989 * share, gpt3, layout, is_fitted=is_fitted)
        )
    largest = gpt(112, 18432, 144, vocab=131_072, sequence=4096)
    layout = spread(6144, tensor=8, pipeline=16, virtual=7, batch=6144, sequence=4096)
    runs.append(h100("GPT 462B, 6144", readme, 989 * 0.475, largest, layout, is_fitted=False))
    dense: tuple[tuple[str, ModelSize, int, dict[str, Any], tuple[Any, ...]], ...] = (
        (
            "Llama 3 70B",
            llama(80, 8192, 28672, 64),
            64,
            {"tensor": 4, "pipeline": 8, "virtual": 5},
            ((256, 728, True), (128, 719, False)),
        ),
        (
            "Llama 3.1 405B",
            # 126 layers; embedding and loss take the places of two more.
            llama(128, 16384, 53248, 128),
            1024,
            {"tensor": 8, "pipeline": 8, "virtual": 8, "context": 2},
            ((1536, 784 * 128 / 126, True), (512, 737 * 128 / 126, False)),
        ),
    )
    for name, model, ranks, sizes, figures in dense:
        for batch, tflops, is_fitted in figures:
            layout = spread(
                ranks, batch=batch, sequence=8192, number_format="fp8", recompute="none", **sizes
            )
            runs.append(
                h100(f"{name} FP8, {batch}", summary, tflops, model, layout, is_fitted=is_fitted)
            )
    return runs + mixtures(summary)


def mixtures(summary: str) -> list[Published]:
    """Published in tokens a second of a GPU."""
    gpt_oss = experts(36, 2880, 64, 8, head=64, num_experts=128, topk=4, width=2880, vocab=201_088)
    qwen30 = experts(48, 2048, 32, 4, num_experts=128, topk=8, width=768, vocab=151_936)
    # 94 layers; embedding and loss take the places of two more.
    qwen235 = experts(96, 4096, 64, 4, num_experts=128, topk=8, width=1536, vocab=151_936)
    found: tuple[tuple[str, int, ModelSize, int, dict[str, Any], int, NumberFormat], ...] = (
        (
            "GPT-OSS 120B",
            5993,
            gpt_oss,
            64,
            {"tensor": 1, "pipeline": 4, "expert": 8},
            1280,
            "bf16",
        ),
        (
            "Qwen3 30B-A3B FP8",
            5113,
            qwen30,
            16,
            {"tensor": 1, "pipeline": 2, "virtual": 12, "expert": 8},
            1024,
            "fp8",
        ),
        (
            # All-to-alls run beside the other micro-batch's products.
            "Qwen3 235B-A22B FP8",
            1633,
            qwen235,
            256,
            {"tensor": 2, "pipeline": 8, "virtual": 4, "expert": 32, "expert_overlap": 0.9},
            8192,
            "fp8",
        ),
    )
    return [
        h100(
            name,
            summary,
            tokens_per_second * model_flops_per_token(model) / 1e12,
            model,
            spread(ranks, batch=batch, sequence=4096, number_format=number_format, **sizes),
            is_fitted=name != "Qwen3 235B-A22B FP8",
        )
        for name, tokens_per_second, model, ranks, sizes, batch, number_format in found
    ]


def predicted_tflops(run: Published) -> float:
    """Of one device, counted as the run's authors count."""
    found = predict(run.model, run.layout, load_profile(run.device))
    if run.counting == "model":
        return found.model_tflops_per_device
    return counted_with_recomputation(run.model, run.layout, found.step_seconds)


def counted_with_recomputation(model: ModelSize, layout: Layout, seconds: float) -> float:
    """96 B s l h^2 (1 + s / 6 h + V / 16 l h) (Narayanan et al. 2021, section 5.1)."""
    h, layers, s = model.hidden_size, model.num_layers, model.sequence_length
    share = 1 + s / (6 * h) + model.vocab_size / (16 * layers * h)
    flops = 96 * layout.tokens_per_step * layers * h**2 * share
    return float(flops / seconds / layout.num_ranks / 1e12)


def report(runs: Sequence[Published]) -> list[dict[str, Any]]:
    rows = []
    for run in runs:
        predicted = predicted_tflops(run)
        rows.append(
            {
                "name": run.name,
                "device": run.device,
                "source": run.source,
                "published_tflops": round(run.tflops, 1),
                "predicted_tflops": round(predicted, 1),
                "error": predicted / run.tflops - 1,
                "is_fitted": run.is_fitted,
                "has_experts": bool(run.model.num_experts),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| run | device | published | predicted | error | constants fitted to it |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['device']} | {row['published_tflops']} | "
            f"{row['predicted_tflops']} | {row['error']:+.1%} | "
            f"{'yes' if row['is_fitted'] else 'no'} |"
        )
    return "\n".join(lines)


def parts(run: Published) -> str:
    found = predict(run.model, run.layout, load_profile(run.device))
    seconds = found.seconds.to_dict()
    shares = ", ".join(
        f"{name} {value / found.step_seconds:.1%}" for name, value in seconds.items() if value
    )
    return f"{run.name}: {found.step_seconds:.2f} s: {shares}; {found.memory.total / 2**30:.1f} GiB"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    positions = range(len(rows))
    for offset, key, colour in (
        (-0.2, "published_tflops", "#888888"),
        (0.2, "predicted_tflops", "#1f6f8b"),
    ):
        axes.barh(
            [position + offset for position in positions],
            [row[key] for row in rows],
            height=0.38,
            color=colour,
            label=key.split("_")[0],
        )
    for position, row in zip(positions, rows, strict=True):
        where = max(row["published_tflops"], row["predicted_tflops"])
        axes.text(where + 8, position, f"{row['error']:+.0%}", va="center", fontsize=8)
    axes.set_yticks(positions, [f"{row['name']} ({row['device']})" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("TFLOP/s of a device, as the source counts")
    axes.legend()
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--parts", action="store_true", help="what each step is spent on")
    options = parser.parse_args(arguments)
    runs = published_runs()
    rows = report(runs)
    print(table(rows))
    if options.parts:
        print("\n".join(parts(run) for run in runs))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        draw(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
