"""Offload under megatron's schedules: every loss and gradient is what it is without, bit for bit.

Copies happen as late as they may (`LateLink`), so a missing wait would show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.megatron_ext.layout_settings import PP2, SP, TP2, VPP2
from tests.parallel.offload.late_link import LateLink
from tests.rank_pool import Ranks

VOCAB_SIZE = 128
CPU = torch.device("cpu")

FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}

# (world size, parallel section, layers): no rank has less than three layers.
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one rank": (1, {}, 4),
    "one rank, recompute full": (1, FULL, 4),
    "one rank, recompute two layers together": (1, FULL | {"recompute_num_layers": 2}, 6),
    "one rank, recompute selective": (1, SELECTIVE, 4),
    "PP2": (2, PP2, 8),
    "PP2, recompute full": (2, PP2 | FULL, 8),
    "PP2 interleaved": (2, PP2 | VPP2, 8),
    "PP2 interleaved, recompute selective": (2, PP2 | VPP2 | SELECTIVE, 8),
    "TP2": (2, TP2, 4),
    "TP2+SP": (2, TP2 | SP, 4),
    "TP2+SPxPP2, recompute full": (4, TP2 | PP2 | FULL | SP, 8),
}
# Of a micro-batch its tokens (the row is longer) and its ratio; one is empty.
BATCHES = [(100, 0.3), (0, 0.5), (128, 1.0), (45, 0.0)]
ROW_TOKENS = 128


def make_batches(ratios: list[float]) -> list[Any]:
    from megatron_ext.batch import pack
    from parallel.plan.records import Piece
    from parallel.plan.rings import RowLayout

    random = np.random.default_rng(0)
    batches = []
    for (num_tokens, _), ratio in zip(BATCHES, ratios, strict=True):
        lengths = [num_tokens // 3, num_tokens - num_tokens // 3] if num_tokens else []
        pieces = [
            (random.integers(0, VOCAB_SIZE, n), random.integers(0, VOCAB_SIZE, n)) for n in lengths
        ]
        layout = RowLayout(
            whole=tuple(Piece(index, 0, n) for index, n in enumerate(lengths)),
            rings=(),
            rank=0,
            offload_ratio=ratio,
        )
        batches.append(pack(pieces, layout, num_tokens=ROW_TOKENS, head_dim=8, rotary_base=10000.0))
    return batches


def build(parallel: dict[str, Any], num_layers: int, dtype: str) -> tuple[Any, Any, Any]:
    """(mesh, wrapped model chunks, reader)."""
    import torch.distributed as dist

    from megatron_ext.mesh import start_mesh
    from megatron_ext.model import build_model, wrap_data_parallel
    from megatron_ext.step import connect_gradients
    from megatron_ext.training_data import BatchReader
    from tests.megatron_ext.tiny_run import tiny_config, tiny_tree

    tree = tiny_tree(
        Path("unread"),
        Path("unread"),
        parallel=parallel,
        model={"num_layers": num_layers},
        precision={"dtype": dtype},
    )
    config = tiny_config(tree, dist.get_world_size())
    mesh = start_mesh(config)
    chunks = wrap_data_parallel(
        build_model(
            config,
            mesh=mesh,
            vocab_size=VOCAB_SIZE,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
            is_cuda=False,
        ),
        config,
    )
    connect_gradients(chunks)
    return mesh, chunks, BatchReader.for_model(config, mesh=mesh, device=CPU)


def step(chunks: Any, reader: Any, ratios: list[float]) -> list[torch.Tensor]:
    """The loss and the gradients of all weights of this rank."""
    from megatron_ext.step import run_micro_batches

    for chunk in chunks:
        chunk.zero_grad_buffer()
    loss = run_micro_batches(chunks, make_batches(ratios), reader=reader, z_loss_coeff=1e-4)
    grads = [parameter.main_grad.clone() for c in chunks for parameter in c.parameters()]
    return [torch.tensor(loss.loss_sum, dtype=torch.float64), *grads]


def compare(
    parallel: dict[str, Any], num_layers: int, dtype: str, cases: list[list[float]]
) -> list[tuple[bool, Any]]:
    """For each case: whether it equals no offload bit for bit, and what was moved."""
    from megatron_ext.activation_offload import install_offload
    from megatron_ext.mesh import stop_mesh
    from parallel.offload.shuttle import Shuttle

    torch.set_num_threads(1)
    try:
        _, chunks, reader = build(parallel, num_layers, dtype)
        wanted = step(chunks, reader, [0.0] * len(BATCHES))
        link = LateLink()
        offload = install_offload(
            chunks, device=CPU, shuttle=Shuttle(CPU, link=link, page_bytes=1 << 13)
        )
        results = []
        for ratios in cases:
            found = step(chunks, reader, ratios)
            count = offload.end_step()
            assert link.num_under_way == 0
            results.append((all(map(torch.equal, found, wanted)), count))
    finally:
        stop_mesh()
    return results


MIXED = [ratio for _, ratio in BATCHES]


def run(ranks: Ranks, layout: str, dtype: str, cases: list[list[float]]) -> list[list[int]]:
    """Offloaded bytes of each case on each rank, where all results are equal."""
    world_size, parallel, num_layers = LAYOUTS[layout]
    reports = ranks.run(world_size, compare, parallel, num_layers, dtype, cases, megatron=True)
    assert all(is_equal for report in reports for is_equal, _ in report)
    return [[count.offloaded_bytes for _, count in report] for report in reports]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("one rank")])
def test_every_ratio_equals_no_offload(ranks: Ranks, layout: str, dtype: str) -> None:
    ratios = (0.0, 0.3, 0.5, 1.0)
    cases = [[ratio] * len(BATCHES) for ratio in ratios]
    (moved,) = run(ranks, layout, dtype, cases)
    # Rows have 128 tokens, of which 38 are 0.3.
    assert moved == [moved[-1] * round(ratio * ROW_TOKENS) // ROW_TOKENS for ratio in ratios]
    assert moved[-1] > 0


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("one rank")])
def test_micro_batches_of_unlike_ratios_equal_no_offload(ranks: Ranks, layout: str) -> None:
    dtype = "bf16" if "interleaved" in layout else "fp32"
    for mixed, half in run(ranks, layout, dtype, [MIXED, [0.5] * len(BATCHES)]):
        assert mixed > 0
        assert mixed / half == pytest.approx(sum(MIXED) / (0.5 * len(BATCHES)), rel=0.05)
