"""Which way tokens travel by which configuration, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.errors import UserError
from megatron_ext.token_dispatcher import choose_dispatcher, expert_node_groups
from moe.dispatch.deepep import has_deep_ep
from tests.megatron_ext.tiny_run import opened, tiny_config, tiny_tree
from tests.rank_pool import RankError, Ranks


def tree_of(corpus: Path, kind: str, **parallel: int) -> dict[str, Any]:
    moe = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_token_dispatcher_type": kind}
    return tiny_tree(corpus, corpus.parent / "run", moe=moe, parallel=parallel)


def chosen(trees: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Dispatcher of a layer, and its legs, where all ranks share the experts."""
    group = dist.group.WORLD
    assert group is not None
    found = []
    for tree in trees:
        config = tiny_config(tree, group.size())
        node_groups = expert_node_groups(config, group)
        dispatcher = choose_dispatcher(config.moe, group=group, node_groups=node_groups)
        found.append((type(dispatcher).__name__, len(getattr(dispatcher, "channels", ()))))
    return found


def of_layer(tree: dict[str, Any]) -> str:
    """Dispatcher that a model's layer has."""
    from megatron_ext.model import unwrap

    with opened(tree) as run:
        return type(unwrap(run.chunks[0]).decoder.layers[0].mlp.dispatcher).__name__


def test_the_way_follows_nodes_and_names(ranks: Ranks, corpus: Path) -> None:
    ep4 = {"expert_model_parallel_size": 4}
    hierarchical, exact = ("HierarchicalDispatcher", 2), ("ExactDispatcher", 1)
    cases = [
        # Without a launcher's word all four are on one node.
        (tree_of(corpus, "auto", **ep4), exact),
        (tree_of(corpus, "auto", ranks_per_node=2, **ep4), hierarchical),
        (tree_of(corpus, "exact", ranks_per_node=2, **ep4), exact),
        # Nothing to gain: one rank a node, or one node.
        (tree_of(corpus, "auto", ranks_per_node=1, **ep4), exact),
        (tree_of(corpus, "auto", ranks_per_node=8, **ep4), exact),
        (tree_of(corpus, "auto", ranks_per_node=3, **ep4), exact),
        (tree_of(corpus, "hierarchical", ranks_per_node=1, **ep4), hierarchical),
        (tree_of(corpus, "hierarchical", ranks_per_node=8, **ep4), hierarchical),
    ]
    for found in ranks.run(4, chosen, [tree for tree, _ in cases]):
        assert found == [expected for _, expected in cases]
    assert ranks.run(1, chosen, [tree_of(corpus, "auto")]) == [[("LocalDispatcher", 0)]]


def test_a_layer_gets_it(ranks: Ranks, corpus: Path) -> None:
    tree = tree_of(corpus, "auto", ranks_per_node=2, expert_model_parallel_size=4)
    assert ranks.run(4, of_layer, tree, megatron=True) == ["HierarchicalDispatcher"] * 4


@pytest.mark.parametrize(
    ("kind", "parallel", "message"),
    [
        ("hierarchical", {}, "moe_token_dispatcher_type=hierarchical needs ranks that share"),
        ("deep_ep", {}, "moe_token_dispatcher_type=deep_ep needs ranks that share experts"),
        (
            "hierarchical",
            {"expert_model_parallel_size": 4, "ranks_per_node": 3},
            "parallel.ranks_per_node=3: groups of parallel.expert_model_parallel_size=4",
        ),
    ],
)
def test_what_cannot_be_is_refused_early(
    corpus: Path, kind: str, parallel: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(tree_of(corpus, kind, **parallel), 4)


@pytest.mark.skipif(bool(has_deep_ep()), reason="DeepEP is here")
def test_deep_ep_says_why_not(ranks: Ranks, corpus: Path) -> None:
    reason = has_deep_ep().reason
    assert reason
    if not torch.cuda.is_available():
        assert reason == "DeepEP needs an NVIDIA GPU"
    tree = tree_of(corpus, "deep_ep", expert_model_parallel_size=2)
    with pytest.raises(RankError, match="deep_ep cannot run here: DeepEP"):
        ranks.run(2, chosen, [tree])
