"""Predicted bytes against the tensors of real ranks at their fullest, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.planning.layout import layout_of, model_size
from megatron_ext.planning.memory import stage_memory
from tests.megatron_ext.layout_settings import EP2, PP2, SP, TP2, VPP2
from tests.megatron_ext.tiny_run import tiny_config, tiny_tree
from tests.rank_pool import Ranks

VOCAB_SIZE = 1024
MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 384,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "qk_layernorm": False,
    "vocab_size": VOCAB_SIZE,
}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 192}
BF16, FP32 = {"dtype": "bf16"}, {"dtype": "fp32"}
FULL = {"recompute_granularity": "full"}

# (ranks, changes of sections)
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one rank": (1, {}),
    "QK norm, tied": (
        1,
        {"model": {"qk_layernorm": True, "untie_embeddings_and_output_weights": False}},
    ),
    "float32, Lion": (1, {"precision": FP32, "optim": {"optimizer": "lion"}}),
    "large vocabulary": (1, {"model": {"vocab_size": 8192}}),
    "full recomputation": (1, {"parallel": FULL}),
    "core_attn": (1, {"parallel": {"recompute_granularity": "selective"}}),
    "mlp": (1, {"parallel": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}}),
    "experts": (1, {"moe": EXPERTS}),
    "DP2 ZeRO-1": (2, {}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "PP2": (2, {"parallel": PP2}),
    "PP2 interleaved": (2, {"parallel": PP2 | VPP2}),
    "TP2+SPxPP2": (4, {"parallel": TP2 | SP | PP2}),
    "FP8": (1, {"precision": BF16 | {"recipe": "fp8_blockwise"}}),
    "NVFP4": (1, {"precision": BF16 | {"recipe": "nvfp4"}}),
    "MXFP4, wide": (
        1,
        {"model": {"ffn_hidden_size": 768}, "precision": BF16 | {"recipe": "mxfp4"}},
    ),
    "EP2": (2, {"parallel": EP2, "moe": EXPERTS}),
}


def measure(tree: dict[str, Any]) -> dict[str, int]:
    """Of this rank: bytes of tensors between two steps, and the most during the second."""
    from megatron_ext import cpu

    cpu.install()
    from megatron_ext import trainer
    from tests.megatron_ext.tiny_run import opened
    from tests.tensor_meter import TensorMeter

    meter = TensorMeter()
    with meter, opened(tree) as run:
        trainer.train_step(run)
        live = meter.live_bytes
        meter.reset_peak()
        trainer.train_step(run)
        return {"stage": run.mesh.pipeline_rank, "live": live, "peak": meter.peak_bytes}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_of_ranks(name: str, ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    num_ranks, changes = LAYOUTS[name]
    sections: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "data": {"max_sequence_length": 512, "tokens_per_rank": 512},
        # Enough micro-batches to fill a pipeline.
        "train": {"global_batch_tokens": 4 * 512 * num_ranks},
        "precision": BF16,
    }
    sections |= {key: sections.get(key, {}) | fields for key, fields in changes.items()}
    tree = tiny_tree(corpus, tmp_path / "run", **sections)
    config = tiny_config(tree, num_ranks)
    vocab_size = sections["model"]["vocab_size"]
    layout = layout_of(
        config,
        num_ranks=num_ranks,
        vocab_size=vocab_size,
        is_bf16=sections["precision"] != FP32,
    )
    model = model_size(config, vocab_size=vocab_size)
    for measured in ranks.run(num_ranks, measure, tree):
        predicted = stage_memory(model, layout, measured["stage"])
        state = predicted.weights + predicted.gradients + predicted.optimizer
        # What else lives between steps: batches, and the pipeline's last messages.
        messages = 4 * 512 * model.hidden_size * layout.weight_bytes
        assert state <= measured["live"] <= state + messages + 64_000
        assert predicted.total == pytest.approx(measured["peak"], rel=0.1)
