"""Whole parameters from the blocks of tensor-parallel ranks and back."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.megatron_ext.tiny_run import opened, tiny_tree
from tests.rank_pool import Ranks


def check_inverse() -> None:
    """`join` undoes `cut` and the other way round, whatever is spread over whatever."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from megatron_ext.parameters import ParameterShard

    @settings(deadline=None, database=None)
    @given(
        block=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        dim=st.none() | st.integers(0, 2),
        num_blocks=st.sampled_from([1, 2]),
        tensor_size=st.integers(1, 4),
    )
    def check(block: list[int], dim: int | None, num_blocks: int, tensor_size: int) -> None:
        if dim is not None:
            dim %= len(block)
            block[dim] *= num_blocks
        parameter = torch.nn.Parameter(torch.zeros(block))
        shard = ParameterShard("name", parameter, dim, num_blocks)
        shape = shard.whole_shape(tensor_size)
        expected = [size * (tensor_size if index == dim else 1) for index, size in enumerate(block)]
        assert list(shape) == expected
        whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        blocks = [shard.cut(whole, rank=rank, size=tensor_size) for rank in range(tensor_size)]
        assert all(list(cut.shape) == block for cut in blocks)
        assert torch.equal(shard.join(blocks), whole)
        if dim is not None:
            # Each number of the whole stands on exactly one rank.
            assert torch.equal(torch.cat(blocks, dim).flatten().sort().values, whole.flatten())

    check()


def test_cut_and_join_are_inverse(ranks: Ranks) -> None:
    ranks.run(1, check_inverse, megatron=True)


def check_gate_and_up() -> None:
    from megatron_ext.parameters import ParameterShard

    gate, up = torch.arange(8.0).reshape(4, 2), torch.arange(8.0, 16.0).reshape(4, 2)
    whole = torch.cat([gate, up])
    for rank in range(2):
        shard = ParameterShard("linear_fc1.weight", torch.nn.Parameter(torch.zeros(4, 2)), 0, 2)
        rows = slice(2 * rank, 2 * rank + 2)
        # Every rank needs the gate of its own up rows.
        expected = torch.cat([gate[rows], up[rows]])
        assert torch.equal(shard.cut(whole, rank=rank, size=2), expected)


def test_gate_and_up_are_cut_each_on_its_own(ranks: Ranks) -> None:
    ranks.run(1, check_gate_and_up, megatron=True)


def described(tree: dict[str, dict[str, object]]) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Global name -> (whole shape, dim that is spread)."""
    from megatron_ext.parameters import parameter_shards

    with opened(tree) as run:
        return {
            shard.name: (shard.whole_shape(run.mesh.along(shard.axis).size), shard.dim)
            for shard in parameter_shards(run.chunks)
        }


def test_names_and_whole_shapes_do_not_depend_on_the_layout(ranks: Ranks, corpus: Path) -> None:
    def names(world_size: int, **parallel: int) -> dict[str, tuple[int, ...]]:
        tree = tiny_tree(corpus, corpus.parent / "run", parallel=parallel)
        reports = ranks.run(world_size, described, tree, megatron=True)
        return {name: shape for report in reports for name, (shape, _) in report.items()}

    single = names(1)
    assert single["decoder.layers.3.mlp.linear_fc1.weight"] == (128, 32)
    assert single["decoder.layers.0.self_attention.linear_qkv.weight"] == (64, 32)
    assert single["embedding.word_embeddings.weight"] == (384, 32)
    assert single["output_layer.weight"] == (384, 32)
    assert names(2, tensor_model_parallel_size=2) == single
    assert names(2, pipeline_model_parallel_size=2) == single
    interleaved = names(2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert interleaved == single
